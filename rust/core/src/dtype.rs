//! Element types: what a tensor may hold, and the floating-point ones as Rust types.

use half::{bf16, f16};

/// Element type of an array.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum Dtype {
    F64,
    F32,
    F16,
    BF16,
    F8E4M3,
    F8E5M2,
    I64,
    I32,
    I16,
    I8,
    U8,
    Bool,
}

impl Dtype {
    /// Name as torch and `numpy` write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F64 => "float64",
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
            Self::F8E4M3 => "float8_e4m3fn",
            Self::F8E5M2 => "float8_e5m2",
            Self::I64 => "int64",
            Self::I32 => "int32",
            Self::I16 => "int16",
            Self::I8 => "int8",
            Self::U8 => "uint8",
            Self::Bool => "bool",
        }
    }

    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 => 8,
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::BF16 | Self::I16 => 2,
            Self::F8E4M3 | Self::F8E5M2 | Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }
}

/// What sums of an [`Element`] run in: `f32`, or `f64` for `f64`.
pub trait Accumulator:
    Copy
    + Default
    + Send
    + Sync
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
    + std::ops::AddAssign
    + 'static
{
    /// `self * a + b`, rounded once.
    #[must_use]
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// From a constant.
    fn from_f64(value: f64) -> Self;
    /// To the widest type.
    fn to_f64(self) -> f64;
}

macro_rules! accumulator {
    ($type:ty) => {
        impl Accumulator for $type {
            #[inline(always)]
            fn mul_add(self, a: Self, b: Self) -> Self {
                self.mul_add(a, b)
            }
            #[inline(always)]
            fn from_f64(value: f64) -> Self {
                value as Self
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                self.into()
            }
        }
    };
}
accumulator!(f32);
accumulator!(f64);

/// A floating-point element type of tokens and weights.
pub trait Element: Copy + Default + Send + Sync + PartialEq + 'static {
    /// What sums run in.
    type Acc: Accumulator;
    /// Its name among the dtypes.
    const DTYPE: Dtype;
    /// Exact.
    fn widen(self) -> Self::Acc;
    /// Rounded to nearest, ties to even.
    fn round(value: Self::Acc) -> Self;
}

macro_rules! element {
    ($type:ty, $dtype:ident, $acc:ty, |$x:ident| $widen:expr, |$y:ident| $round:expr) => {
        impl Element for $type {
            type Acc = $acc;
            const DTYPE: Dtype = Dtype::$dtype;
            #[inline(always)]
            fn widen(self) -> $acc {
                let $x = self;
                $widen
            }
            #[inline(always)]
            fn round($y: $acc) -> Self {
                $round
            }
        }
    };
}
element!(f64, F64, f64, |x| x, |y| y);
element!(f32, F32, f32, |x| x, |y| y);
element!(f16, F16, f32, |x| x.to_f32(), |y| f16::from_f32(y));
element!(bf16, BF16, f32, |x| f32::from_bits(u32::from(x.to_bits()) << 16), |y| round_bf16(y));

/// Round to nearest even without a branch, so that loops over it vectorise; half's own does not.
#[inline(always)]
fn round_bf16(value: f32) -> bf16 {
    const QUIET: u32 = 0x40;
    let bits = value.to_bits();
    let nearest = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    bf16::from_bits(if value.is_nan() { (bits >> 16) | QUIET } else { nearest } as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bfloat16_rounds_as_half_does() {
        // Every upper half with lower halves below, at and above the tie.
        for upper in 0..=u16::MAX {
            for lower in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
                let value = f32::from_bits(u32::from(upper) << 16 | lower);
                assert_eq!(round_bf16(value).to_bits(), bf16::from_f32(value).to_bits());
            }
            let exact = bf16::from_bits(upper);
            assert!(exact.is_nan() || exact.widen() == exact.to_f32());
        }
    }
}
