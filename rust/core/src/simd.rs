//! Plain loops compiled again for the vector units of the machine at hand.
#![allow(unsafe_code, reason = "calls code compiled for instructions that the CPU was asked for")]

use crate::isa::{self, Isa};

/// Work that [`widest`] compiles once per instruction set.
pub trait Job {
    /// What it computes.
    type Output;
    /// Must be `#[inline(always)]`, and so must all that it calls in its loops: a function that is
    /// not inlined keeps the instruction set of the baseline, where `mul_add` is a library call.
    fn run(self) -> Self::Output;
}

/// Runs the job with the widest instructions that this process uses, see [`isa::chosen`].
///
/// The bits do not depend on which: `mul_add` is explicit, and the compiler neither fuses nor
/// reorders floating-point operations on its own.
pub fn widest<J: Job>(job: J) -> J::Output {
    // SAFETY: what is chosen is one of the CPU's own.
    unsafe { run(isa::chosen_or_scalar(), job) }
}

/// Runs the job with the instructions of `isa`.
///
/// # Panics
///
/// If this CPU has not got them.
pub fn run_with<J: Job>(isa: Isa, job: J) -> J::Output {
    assert!(isa <= Isa::detect(), "this CPU has no {}", isa.name());
    // SAFETY: asserted.
    unsafe { run(isa, job) }
}

/// # Safety
///
/// The CPU has the features of `isa`.
#[inline]
unsafe fn run<J: Job>(isa: Isa, job: J) -> J::Output {
    match isa {
        // SAFETY: as the caller promises; `avx512` and `avx2` enable what the names stand for.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Avx512Bf16 => unsafe { avx512(job) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx2 => unsafe { avx2(job) },
        _ => job.run(),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn avx2<J: Job>(job: J) -> J::Output {
    job.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
fn avx512<J: Job>(job: J) -> J::Output {
    job.run()
}
