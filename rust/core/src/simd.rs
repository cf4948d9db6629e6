//! Plain loops compiled again for the vector units of the machine at hand.
#![allow(unsafe_code, reason = "calls code compiled for instructions that the CPU was asked for")]

/// Work that [`widest`] compiles once per instruction set.
pub trait Job {
    /// What it computes.
    type Output;
    /// Must be `#[inline(always)]`, and so must all that it calls in its loops: a function that is
    /// not inlined keeps the instruction set of the baseline, where `mul_add` is a library call.
    fn run(self) -> Self::Output;
}

/// Runs the job with the widest instructions the CPU has.
///
/// The bits do not depend on which: `mul_add` is explicit, and the compiler neither fuses nor
/// reorders floating-point operations on its own.
pub fn widest<J: Job>(job: J) -> J::Output {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx2") && has!("fma") && has!("f16c") {
            if has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") {
                // SAFETY: the CPU has every feature that `avx512` enables.
                return unsafe { avx512(job) };
            }
            // SAFETY: the CPU has every feature that `avx2` enables.
            return unsafe { avx2(job) };
        }
    }
    job.run()
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
