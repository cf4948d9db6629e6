//! What this machine can do at most: multiply-add rates and read bandwidth, measured.
//!
//! Benchmarks show these beside their times. The loops do nothing useful, as fast as possible.
#![allow(unsafe_code, reason = "instructions of one instruction set, chosen at run time")]

use crate::threads;
use std::hint::black_box;
use std::time::{Duration, Instant};

/// One measured rate, and what measured it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// Operations, or bytes, per second over all threads.
    pub per_second: f64,
    /// The instruction or access pattern.
    pub by: &'static str,
}

/// Float32 operations per second (a multiply-add counts as two).
pub fn fma_rate(time: Duration) -> Rate {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has avx512f.
            let body = || unsafe { fma_avx512() };
            return Rate { per_second: rate(time, body), by: "512-bit float32 multiply-add" };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the processor has avx2 and fma.
            let body = || unsafe { fma_avx2() };
            return Rate { per_second: rate(time, body), by: "256-bit float32 multiply-add" };
        }
    }
    Rate { per_second: rate(time, fma_portable), by: "float32 multiply-add" }
}

/// Bfloat16 dot-product operations per second; the float32 rate where no instruction does that.
pub fn dot_rate(time: Duration) -> Rate {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512bf16") {
        // SAFETY: the processor has avx512bf16, and with it avx512f.
        let body = || unsafe { dot_avx512_bf16() };
        return Rate { per_second: rate(time, body), by: "512-bit bfloat16 dot product" };
    }
    fma_rate(time)
}

/// Bytes per second read from memory by all threads, four streams each.
pub fn read_bandwidth(time: Duration) -> Rate {
    // Larger than any last-level cache share of one thread.
    const WORDS: usize = 64 << 20 >> 3;
    let teams = threads::num_threads().max(1);
    let mut words = crate::arena::take::<u64>(WORDS * teams);
    words.fill(1);
    let words = &words[..];
    let passes = |until: &dyn Fn() -> bool| {
        let mut passes = 0;
        while passes == 0 || !until() {
            threads::for_each(teams, 1, |i| {
                black_box(sum(&words[i * WORDS..(i + 1) * WORDS]));
            });
            passes += 1;
        }
        passes
    };
    let start = Instant::now();
    let passes = passes(&|| start.elapsed() >= time);
    let bytes = (passes * teams * WORDS * 8) as f64;
    Rate { per_second: bytes / start.elapsed().as_secs_f64(), by: "four read streams a thread" }
}

/// Four streams far apart, so that as many lines are under way as the core can track.
fn sum(words: &[u64]) -> u64 {
    let (ab, cd) = words.split_at(words.len() / 2);
    let ((a, b), (c, d)) = (ab.split_at(ab.len() / 2), cd.split_at(cd.len() / 2));
    let mut lanes = [0u64; 32];
    let streams = a.chunks_exact(8).zip(b.chunks_exact(8)).zip(c.chunks_exact(8));
    for (((a, b), c), d) in streams.zip(d.chunks_exact(8)) {
        for i in 0..8 {
            lanes[i] += a[i];
            lanes[8 + i] += b[i];
            lanes[16 + i] += c[i];
            lanes[24 + i] += d[i];
        }
    }
    lanes.iter().sum()
}

/// Runs `body`, which tells how many operations it did, on every thread until `time` is over.
fn rate(time: Duration, body: impl Fn() -> usize + Sync) -> f64 {
    let teams = threads::num_threads().max(1);
    let done: Vec<_> = (0..teams).map(|_| std::sync::atomic::AtomicUsize::new(0)).collect();
    let start = Instant::now();
    threads::for_each(teams, 1, |i| {
        // Once at least: on a busy machine a thread may begin when the time is over.
        let mut operations = body();
        while start.elapsed() < time {
            operations += body();
        }
        done[i].store(operations, std::sync::atomic::Ordering::Relaxed);
    });
    let total: usize = done.iter().map(|d| d.load(std::sync::atomic::Ordering::Relaxed)).sum();
    total as f64 / start.elapsed().as_secs_f64()
}

const STEPS: usize = 4096;

fn fma_portable() -> usize {
    let (mut sums, factor) = ([1.0f32; 32], black_box(0.999f32));
    for _ in 0..STEPS {
        for sum in &mut sums {
            *sum = *sum * factor + 0.001;
        }
    }
    black_box(sums);
    STEPS * 32 * 2
}

/// Independent accumulators: more than latency times issue width of any core so far.
#[cfg(target_arch = "x86_64")]
const CHAINS: usize = 12;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
unsafe fn fma_avx512() -> usize {
    use std::arch::x86_64::{_mm512_fmadd_ps, _mm512_set1_ps};
    let factor = _mm512_set1_ps(black_box(0.999));
    let mut sums = [_mm512_set1_ps(1.0); CHAINS];
    for _ in 0..STEPS {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(*sum, factor, factor);
        }
    }
    black_box(sums);
    STEPS * CHAINS * 16 * 2
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn fma_avx2() -> usize {
    use std::arch::x86_64::{_mm256_fmadd_ps, _mm256_set1_ps};
    let factor = _mm256_set1_ps(black_box(0.999));
    let mut sums = [_mm256_set1_ps(1.0); CHAINS];
    for _ in 0..STEPS {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(*sum, factor, factor);
        }
    }
    black_box(sums);
    STEPS * CHAINS * 8 * 2
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn dot_avx512_bf16() -> usize {
    use std::arch::x86_64::{
        __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_set1_epi32, _mm512_set1_ps,
    };
    let pair = _mm512_set1_epi32(black_box(0x3f80_3f80));
    // SAFETY: both are 512 bits without invalid values.
    let pair = unsafe { std::mem::transmute::<__m512i, __m512bh>(pair) };
    let mut sums = [_mm512_set1_ps(1.0); CHAINS];
    for _ in 0..STEPS {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, pair, pair);
        }
    }
    black_box(sums);
    STEPS * CHAINS * 32 * 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_limit_is_a_positive_number() {
        let time = Duration::from_millis(5);
        for rate in [fma_rate(time), dot_rate(time), read_bandwidth(time)] {
            assert!(rate.per_second > 0.0 && rate.per_second.is_finite(), "{rate:?}");
        }
    }

    #[test]
    fn the_streams_cover_every_word() {
        assert_eq!(sum(&vec![1; 256]), 256);
    }
}
