//! Which vector instructions this process uses: found out once, for every kernel.

use crate::error::{Error, Result};
use std::sync::OnceLock;

/// Instruction sets that kernels are compiled for, each a superset of those before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// What every machine runs.
    Scalar,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// With bf16 dot products.
    Avx512Bf16,
}

impl Isa {
    /// All, ascending.
    pub const ALL: [Self; 4] = [Self::Scalar, Self::Avx2, Self::Avx512, Self::Avx512Bf16];

    /// As `FERROMOE_ISA` and `ferromoe info` write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512_bf16",
        }
    }

    /// The best one of this CPU.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            macro_rules! has {
                ($($feature:tt)*) => { $(std::is_x86_feature_detected!($feature))&&* };
            }
            if !has!("avx2" "fma" "f16c") {
                return Self::Scalar;
            }
            if !has!("avx512f" "avx512bw" "avx512dq" "avx512vl") {
                return Self::Avx2;
            }
            if has!("avx512bf16") { Self::Avx512Bf16 } else { Self::Avx512 }
        }
        #[cfg(not(target_arch = "x86_64"))]
        Self::Scalar
    }

    /// Those of this CPU, ascending.
    pub fn available() -> impl Iterator<Item = Self> {
        let best = Self::detect();
        Self::ALL.into_iter().filter(move |isa| *isa <= best)
    }
}

/// The instruction set of this process: the best one, or a lower one by `FERROMOE_ISA`, which the
/// tests use. Read once.
///
/// # Errors
///
/// [`Error::Value`] where the variable asks for something this CPU has not.
pub fn chosen() -> Result<Isa> {
    choice().as_ref().copied().map_err(|got| {
        let names: Vec<_> = Isa::available().map(Isa::name).collect();
        let expected = format!("be one of {}, which this CPU has", names.join(", "));
        Error::Value { op: "ferromoe", arg: "FERROMOE_ISA", expected, got: format!("'{got}'") }
    })
}

/// The same for kernels that cannot fail: their callers see the error elsewhere.
#[inline]
pub(crate) fn chosen_or_scalar() -> Isa {
    choice().as_ref().copied().unwrap_or(Isa::Scalar)
}

/// Either the instruction set, or the name that none of this CPU has.
#[inline]
fn choice() -> &'static Result<Isa, String> {
    static CHOICE: OnceLock<Result<Isa, String>> = OnceLock::new();
    CHOICE.get_or_init(|| match std::env::var_os("FERROMOE_ISA") {
        Some(name) => Isa::available()
            .find(|isa| name == isa.name())
            .ok_or_else(|| name.to_string_lossy().into_owned()),
        None => Ok(Isa::detect()),
    })
}
