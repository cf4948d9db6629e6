//! The arithmetic of routers: one `exp` for every device, sums in one order, keys that sort.
//!
//! Scores decide which experts a token gets, and `exp` of one library differs from another's in the
//! last bit. These are therefore written out, with every fused multiply-add explicit.

use super::select::Key;
use crate::dtype::Accumulator;

/// Lanes of a sum over experts: a warp, two AVX-512 registers, four AVX2 registers.
const LANES: usize = 32;
/// The experts of one token are seldom more.
pub const FEW: usize = 8;

/// What router arithmetic runs in: `f32`, or `f64` for `f64` logits.
pub trait Real: Accumulator {
    /// An integer in the order of the values, NaN above +inf, −0 equal to +0.
    type Key: Key;
    /// Below every number.
    const LOWEST: Self;
    /// See [`Real::Key`].
    fn key(self) -> Self::Key;
    /// e to the power of `self`, within 1 ulp.
    #[must_use]
    fn exp(self) -> Self;
    /// `ln(1 + self)` for `self` in 0..=1.
    #[must_use]
    fn log1p(self) -> Self;
    /// Square root, correctly rounded.
    #[must_use]
    fn sqrt(self) -> Self;
    /// Magnitude.
    #[must_use]
    fn abs(self) -> Self;
    /// `self` to the power of `p`.
    #[must_use]
    fn powf(self, p: Self) -> Self;
}

impl Real for f32 {
    type Key = i32;
    const LOWEST: Self = f32::NEG_INFINITY;

    #[inline(always)]
    fn key(self) -> i32 {
        // Adding 0 turns −0 into +0.
        let value = if self.is_nan() { f32::from_bits(0x7fc0_0000) } else { self + 0.0 };
        let bits = value.to_bits() as i32;
        // Of negative numbers the larger magnitude is the smaller value.
        bits ^ (((bits >> 31) as u32) >> 1) as i32
    }

    #[inline(always)]
    fn exp(self) -> f32 {
        // e^x = 2^n · e^r with n = round(x / ln 2): adding 1.5 · 2^23 leaves n in the low bits.
        const ROUND: f32 = 12_582_912.0;
        // ln 2 in two parts, the first with zeros at the end, so that n times it is exact.
        const LN2_HIGH: f32 = 0.693_359_4;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        // Taylor's series; at |r| <= ln 2 / 2 the first term left out is 5e-9 of the result.
        const TERMS: [f32; 7] = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
        // Beyond these the result is 0 or inf anyway; NaN passes.
        let x = self.clamp(-105.0, 89.0);
        let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
        let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
        let whole = shifted - ROUND;
        let r = whole.mul_add(-LN2_LOW, whole.mul_add(-LN2_HIGH, x));
        let mut sum = 1.0 / 5040.0;
        for term in TERMS {
            sum = r.mul_add(sum, term);
        }
        // In two steps: 2^n itself can lie outside the normal numbers.
        let half = n >> 1;
        sum * power_of_two(half) * power_of_two(n.wrapping_sub(half))
    }

    #[inline(always)]
    fn log1p(self) -> f32 {
        // 2 · atanh(s), s = x / (2 + x) <= 1/3; the first term left out is 2e-9 of the result.
        const TERMS: [f32; 7] =
            [1.0 / 13.0, 1.0 / 11.0, 1.0 / 9.0, 1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0, 1.0];
        let s = self / (2.0 + self);
        let square = s * s;
        let mut sum = 1.0 / 15.0;
        for term in TERMS {
            sum = square.mul_add(sum, term);
        }
        2.0 * s * sum
    }

    #[inline(always)]
    fn sqrt(self) -> f32 {
        self.sqrt()
    }
    #[inline(always)]
    fn abs(self) -> f32 {
        self.abs()
    }
    #[inline(always)]
    fn powf(self, p: f32) -> f32 {
        self.powf(p)
    }
}

#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits(n.wrapping_add(127).wrapping_shl(23) as u32)
}

/// For checks against finite differences; its last bits are the library's.
impl Real for f64 {
    type Key = i64;
    const LOWEST: Self = f64::NEG_INFINITY;

    #[inline(always)]
    fn key(self) -> i64 {
        let value = if self.is_nan() { f64::from_bits(0x7ff8 << 48) } else { self + 0.0 };
        let bits = value.to_bits() as i64;
        bits ^ (((bits >> 63) as u64) >> 1) as i64
    }
    #[inline(always)]
    fn exp(self) -> f64 {
        self.exp()
    }
    #[inline(always)]
    fn log1p(self) -> f64 {
        self.ln_1p()
    }
    #[inline(always)]
    fn sqrt(self) -> f64 {
        self.sqrt()
    }
    #[inline(always)]
    fn abs(self) -> f64 {
        self.abs()
    }
    #[inline(always)]
    fn powf(self, p: f64) -> f64 {
        self.powf(p)
    }
}

/// `L` strided partial results, then a tree.
///
/// Of up to `L` values every number of lanes gives the same bits: the others hold what changes
/// nothing.
#[inline(always)]
fn fold_in<A: Real, const L: usize>(values: &[A], start: A, f: impl Fn(A, A) -> A) -> A {
    let mut part = [start; L];
    let (blocks, rest) = values.as_chunks::<L>();
    for block in blocks {
        for (part, &value) in part.iter_mut().zip(block) {
            *part = f(*part, value);
        }
    }
    for (part, &value) in part.iter_mut().zip(rest) {
        *part = f(*part, value);
    }
    let mut width = L / 2;
    while width > 0 {
        for lane in 0..width {
            part[lane] = f(part[lane], part[lane + width]);
        }
        width /= 2;
    }
    part[0]
}

#[inline(always)]
fn fold<A: Real>(values: &[A], start: A, f: impl Fn(A, A) -> A) -> A {
    if values.len() <= FEW {
        fold_in::<A, FEW>(values, start, f)
    } else {
        fold_in::<A, LANES>(values, start, f)
    }
}

/// Sum in the fixed order.
#[inline(always)]
pub fn sum<A: Real>(values: &[A]) -> A {
    fold(values, A::default(), |a, b| a + b)
}

/// Replaces each value by `e^(value − max)` and gives their sum.
///
/// A NaN, a +inf, or nothing but −inf makes the sum NaN.
#[inline(always)]
pub fn exp_and_sum<A: Real>(values: &mut [A]) -> A {
    if values.len() <= FEW {
        // A loop of known length is one vector; e^(−∞ − max) adds nothing.
        let mut few = [A::LOWEST; FEW];
        few.iter_mut().zip(&*values).for_each(|(few, &value)| *few = value);
        let total = exp_of_all(&mut few);
        values.iter_mut().zip(few).for_each(|(value, few)| *value = few);
        return total;
    }
    exp_of_all(values)
}

#[inline(always)]
fn exp_of_all<A: Real>(values: &mut [A]) -> A {
    let max = fold(values, A::LOWEST, |a, b| if b > a { b } else { a });
    for value in values.iter_mut() {
        *value = (*value - max).exp();
    }
    sum(values)
}

/// Softmax in place.
#[inline(always)]
pub fn softmax<A: Real>(values: &mut [A]) {
    let total = exp_and_sum(values);
    for value in values {
        *value = *value / total;
    }
}

/// Softmax in place of rows that end in −∞; the same bits as of each without its end.
#[inline(always)]
pub fn softmax_of_few<A: Real>(rows: &mut [[A; FEW]]) {
    for row in &mut *rows {
        let max = fold_in::<A, FEW>(row, A::LOWEST, |a, b| if b > a { b } else { a });
        for value in row {
            *value = *value - max;
        }
    }
    // In one pass: a row alone would wait for one long chain of operations.
    for value in rows.as_flattened_mut() {
        *value = value.exp();
    }
    for row in rows {
        let total = fold_in::<A, FEW>(row, A::default(), |a, b| a + b);
        for value in row {
            *value = *value / total;
        }
    }
}

/// 1 / (1 + e^−z), without overflow.
#[inline(always)]
pub fn sigmoid<A: Real>(z: A) -> A {
    let one = A::from_f64(1.0);
    let e = (-z.abs()).exp();
    (if z < A::default() { e } else { one }) / (one + e)
}

/// `ln(sigmoid(z))`.
#[inline(always)]
pub fn log_sigmoid<A: Real>(z: A) -> A {
    let low = if z < A::default() { z } else { A::default() };
    low - (-z.abs()).exp().log1p()
}

/// Hyperbolic tangent, within 3 ulp.
#[inline(always)]
pub fn tanh<A: Real>(z: A) -> A {
    // Near 0 the quotient below cancels; there, a minimax polynomial in z² (of the Cephes library).
    const TERMS: [f64; 5] = [
        -5.704_988_727_45e-3,
        2.063_908_879_54e-2,
        -5.373_971_555_31e-2,
        1.333_144_220_36e-1,
        -3.333_328_194_22e-1,
    ];
    let one = A::from_f64(1.0);
    let square = z * z;
    let mut sum = A::from_f64(TERMS[0]);
    for term in &TERMS[1..] {
        sum = square.mul_add(sum, A::from_f64(*term));
    }
    let near = (square * sum).mul_add(z, z);
    let e = (z.abs() * A::from_f64(-2.0)).exp();
    let far = (one - e) / (one + e);
    let far = if z < A::default() { -far } else { far };
    if z.abs() < A::from_f64(0.625) { near } else { far }
}

/// Below it softplus(z) is e^z to the last bit, and its square root e^(z/2), which underflows later.
const SMALL: f64 = -15.0;

/// `sqrt(ln(1 + e^z))`.
#[inline(always)]
pub fn sqrt_softplus<A: Real>(z: A) -> A {
    let tail = (z * A::from_f64(0.5)).exp();
    let high = if z > A::default() { z } else { A::default() };
    let root = (high + (-z.abs()).exp().log1p()).sqrt();
    if z < A::from_f64(SMALL) { tail } else { root }
}

/// Derivative of [`sqrt_softplus`] at `z`, where its value is `y`.
#[inline(always)]
pub fn sqrt_softplus_slope<A: Real>(z: A, y: A) -> A {
    let half = A::from_f64(0.5);
    if z < A::from_f64(SMALL) { half * y } else { half * sigmoid(z) / y }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sweep() -> impl Iterator<Item = f32> {
        (-11_000..=9_000).map(|i| i as f32 * 0.010_07)
    }

    /// Distance in units of the last place of the exact value.
    fn ulps(got: f32, exact: f64) -> f64 {
        let nearest = exact as f32;
        let spacing = f64::from(f32::from_bits(nearest.to_bits() + 1)) - f64::from(nearest);
        (f64::from(got) - exact).abs() / spacing
    }

    #[test]
    fn exp_is_within_an_ulp_down_to_the_denormals() {
        for x in sweep().filter(|&x| x < 88.7) {
            let error = ulps(Real::exp(x), f64::from(x).exp());
            assert!(error <= 1.0, "exp({x}) is off by {error} ulp");
        }
    }

    #[test]
    fn exp_ends_in_zero_and_infinity_and_passes_nan() {
        assert_eq!(Real::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(Real::exp(-1e4f32), 0.0);
        assert_eq!(Real::exp(0.0f32), 1.0);
        assert_eq!(Real::exp(89.0f32), f32::INFINITY);
        assert_eq!(Real::exp(f32::INFINITY), f32::INFINITY);
        assert!(Real::exp(f32::NAN).is_nan());
    }

    #[test]
    fn the_scores_are_as_good_as_float64_rounded() {
        for z in sweep() {
            let (wide, e) = (f64::from(z), f64::from(z).exp());
            assert!(ulps(sigmoid(z), e / (1.0 + e)) <= 2.0, "sigmoid({z})");
            assert!(ulps(sqrt_softplus(z), e.ln_1p().sqrt()) <= 2.5, "sqrt_softplus({z})");
            assert!(ulps(-log_sigmoid(z), (-wide).exp().ln_1p()) <= 2.5, "log_sigmoid({z})");
            assert!(ulps(tanh(z.abs()), wide.abs().tanh()) <= 3.0, "tanh({z})");
            assert_eq!(tanh(-z), -tanh(z));
        }
    }

    #[test]
    fn slopes_match_finite_differences() {
        for z in [-100.0, -15.001, -14.999, -3.0, 0.0, 2.0, 30.0f64] {
            let difference = (sqrt_softplus(z + 1e-6) - sqrt_softplus(z - 1e-6)) / 2e-6;
            let slope = sqrt_softplus_slope(z, sqrt_softplus(z));
            assert!((slope - difference).abs() <= 1e-8 + 1e-6 * difference, "at {z}");
        }
    }

    #[test]
    fn keys_follow_the_values_with_nan_on_top() {
        let values =
            [f32::NEG_INFINITY, -2.0, -1e-40, 0.0, 1e-40, 1.0, f32::MAX, f32::INFINITY, f32::NAN];
        for pair in values.windows(2) {
            assert!(pair[0].key() < pair[1].key(), "{pair:?}");
            assert!(f64::from(pair[0]).key() < f64::from(pair[1]).key(), "{pair:?}");
        }
        assert_eq!((-0.0f32).key(), 0.0f32.key());
        assert_eq!((-f32::NAN).key(), f32::NAN.key());
    }

    #[test]
    fn sums_of_any_length_are_whole() {
        for len in 0..100 {
            let values: Vec<f32> = (0..len).map(|i| i as f32).collect();
            assert_eq!(sum(&values), (0..len).sum::<i32>() as f32);
        }
    }
}
