//! Dot products of few rows of `f32` with weights of 8 or 4 bits: the weights become `f32` in registers, so
//! memory gives no more than their codes. [`crate::experts::quant`] says how codes lie.
//!
//! There is no scalar twin: without vector units the weights are dequantised first.
#![allow(unsafe_code, reason = "vector loads and calls for CPU features that were detected")]
#![allow(
    clippy::wildcard_imports,
    clippy::needless_range_loop,
    reason = "intrinsics by the dozen; loops over registers keep one index for all arrays"
)]

use super::DOT_ROWS;
use crate::experts::codes::{BLOCK, Bits};
use crate::isa::Isa;

/// The dot products for one kind of codes.
pub struct Dot {
    /// Weight rows that one call takes, with up to half of [`DOT_ROWS`].
    streams: usize,
    bits: Bits,
    #[allow(clippy::type_complexity, reason = "the signature of the method of its name")]
    run: unsafe fn(&[&[f32]], &[&[u8]], &[&[f32]], &mut [f32]),
}

impl Dot {
    /// For codes of an instruction set, where it has vectors; `grouped` if a row has several scales.
    pub(in crate::experts) fn of(isa: Isa, bits: Bits, grouped: bool) -> Option<&'static Self> {
        #[cfg(target_arch = "x86_64")]
        {
            let table = match isa {
                Isa::Scalar => return None,
                Isa::Avx2 => &x86::AVX2,
                Isa::Avx512 | Isa::Avx512Bf16 => &x86::AVX512,
            };
            Some(&table[2 * usize::from(bits == Bits::Four) + usize::from(grouped)])
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = (isa, bits, grouped);
            None
        }
    }

    /// Weight rows that a call with this many rows of x takes: as many as the registers hold.
    pub(in crate::experts) fn streams(&self, rows: usize) -> usize {
        if rows > DOT_ROWS / 2 { self.streams / 2 } else { self.streams }
    }

    /// `out[m][s] = x[m] · w[s]`; rows of `out` are `streams(x.len())` wide.
    ///
    /// Rows of x and of codes are padded to whole blocks; each row of codes has its scales.
    pub(in crate::experts) fn dot(
        &self,
        x: &[&[f32]],
        codes: &[&[u8]],
        scales: &[&[f32]],
        out: &mut [f32],
    ) {
        let streams = self.streams(x.len());
        let (len, groups) = (x[0].len(), scales[0].len());
        assert!((1..=DOT_ROWS).contains(&x.len()) && (1..=streams).contains(&codes.len()));
        assert!(groups > 0 && len.is_multiple_of(BLOCK * groups));
        assert!(x.iter().all(|x| x.len() == len));
        assert!(codes.iter().all(|codes| codes.len() == len / BLOCK * self.bits.block_bytes()));
        assert!(scales.len() == codes.len() && scales.iter().all(|s| s.len() == groups));
        assert!(out.len() >= x.len() * streams);
        // SAFETY: `of` was asked for the CPU's own instruction set; lengths as asserted.
        unsafe { (self.run)(x, codes, scales, out) }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::lanes::{Lanes, by_dot_rows};
    use super::{BLOCK, Bits, Dot};
    use std::arch::x86_64::*;

    macro_rules! table {
        ($function:ident, $streams:expr) => {
            [
                Dot { streams: $streams, bits: Bits::Eight, run: $function::<Int8, false> },
                Dot { streams: $streams, bits: Bits::Eight, run: $function::<Int8, true> },
                Dot { streams: $streams, bits: Bits::Four, run: $function::<Int4, false> },
                Dot { streams: $streams, bits: Bits::Four, run: $function::<Int4, true> },
            ]
        };
    }
    const STREAMS_256: usize = 4;
    const STREAMS_512: usize = 8;
    pub(super) static AVX2: [Dot; 4] = table!(dot_256, STREAMS_256);
    pub(super) static AVX512: [Dot; 4] = table!(dot_512, STREAMS_512);

    /// # Safety
    ///
    /// The CPU has the features; lengths as `Dot::dot` asserts.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dot_256<C: Codes<__m256, 4>, const GROUPED: bool>(
        x: &[&[f32]],
        codes: &[&[u8]],
        scales: &[&[f32]],
        out: &mut [f32],
    ) {
        // SAFETY: by this function's contract.
        by_dot_rows!(x.len(), STREAMS_256, |M, W| unsafe {
            rows::<C, __m256, 4, M, W, GROUPED>(x, codes, scales, out.as_mut_ptr());
        });
    }

    /// # Safety
    ///
    /// The CPU has the features; lengths as `Dot::dot` asserts.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn dot_512<C: Codes<__m512, 2>, const GROUPED: bool>(
        x: &[&[f32]],
        codes: &[&[u8]],
        scales: &[&[f32]],
        out: &mut [f32],
    ) {
        // SAFETY: by this function's contract.
        by_dot_rows!(x.len(), STREAMS_512, |M, W| unsafe {
            rows::<C, __m512, 2, M, W, GROUPED>(x, codes, scales, out.as_mut_ptr());
        });
    }

    /// # Safety
    ///
    /// The CPU has the features of `L`; lengths as `Dot::dot` asserts, `out` holds `M * W`.
    #[inline(always)]
    unsafe fn rows<
        C: Codes<L, R>,
        L: Lanes,
        const R: usize,
        const M: usize,
        const W: usize,
        const GROUPED: bool,
    >(
        x: &[&[f32]],
        codes: &[&[u8]],
        scales: &[&[f32]],
        out: *mut f32,
    ) {
        // SAFETY: by this function's contract; blocks end with their rows.
        unsafe {
            let (blocks, groups) = (x[0].len() / BLOCK, scales[0].len());
            let mut xs = [std::ptr::null::<f32>(); M];
            for m in 0..M {
                xs[m] = x.get_unchecked(m).as_ptr();
            }
            let mut ws = [std::ptr::null::<u8>(); W];
            let mut factors = [std::ptr::null::<f32>(); W];
            for s in 0..W {
                // A short call reads its last row again.
                let row = s.min(codes.len() - 1);
                ws[s] = codes.get_unchecked(row).as_ptr();
                factors[s] = scales.get_unchecked(row).as_ptr();
            }
            let mut sum = [[L::zero(); W]; M];
            let mut scale = [L::zero(); W];
            let mut block = 0;
            for group in 0..groups {
                for s in 0..W {
                    scale[s] = C::scale(if GROUPED { *factors[s].add(group) } else { 1.0 });
                }
                for _ in 0..blocks / groups {
                    for s in 0..W {
                        let w = C::values(ws[s].add(block * C::BYTES), scale[s], GROUPED);
                        for r in 0..R {
                            for m in 0..M {
                                let x = L::load(xs[m].add(block * BLOCK + r * L::N));
                                sum[m][s] = w[r].mul_add(x, sum[m][s]);
                            }
                        }
                    }
                    block += 1;
                }
            }
            for m in 0..M {
                let out = out.add(m * W);
                L::sums(&sum[m], out);
                if !GROUPED {
                    for s in 0..W {
                        *out.add(s) *= *factors[s];
                    }
                }
            }
        }
    }

    /// Codes of a block as `R` registers of `f32`.
    trait Codes<L, const R: usize> {
        /// Bytes of a block.
        const BYTES: usize;
        /// What `values` wants to know of a scale.
        unsafe fn scale(scale: f32) -> L;
        /// The codes at `p`, times their scale where they are `grouped`.
        unsafe fn values(p: *const u8, scale: L, grouped: bool) -> [L; R];
    }

    struct Int8;
    struct Int4;

    impl Codes<__m256, 4> for Int8 {
        const BYTES: usize = Bits::Eight.block_bytes();
        #[inline(always)]
        unsafe fn scale(scale: f32) -> __m256 {
            // SAFETY: the caller's features.
            unsafe { _mm256_set1_ps(scale) }
        }
        #[inline(always)]
        unsafe fn values(p: *const u8, scale: __m256, grouped: bool) -> [__m256; 4] {
            // SAFETY: the caller's features; 32 bytes are readable.
            unsafe {
                let mut values = [scale; 4];
                for i in 0..4 {
                    let codes = _mm256_cvtepi8_epi32(_mm_loadl_epi64(p.add(8 * i).cast()));
                    let value = _mm256_cvtepi32_ps(codes);
                    values[i] = if grouped { _mm256_mul_ps(value, scale) } else { value };
                }
                values
            }
        }
    }

    impl Codes<__m256, 4> for Int4 {
        const BYTES: usize = Bits::Four.block_bytes();
        #[inline(always)]
        unsafe fn scale(scale: f32) -> __m256 {
            // SAFETY: the caller's features.
            unsafe { _mm256_set1_ps(scale) }
        }
        #[inline(always)]
        unsafe fn values(p: *const u8, scale: __m256, grouped: bool) -> [__m256; 4] {
            // SAFETY: the caller's features; 16 bytes are readable.
            unsafe {
                let mut values = [scale; 4];
                for i in 0..2 {
                    let both = _mm256_cvtepu8_epi32(_mm_loadl_epi64(p.add(8 * i).cast()));
                    let low = _mm256_and_si256(both, _mm256_set1_epi32(15));
                    for (i, codes) in [(i, low), (2 + i, _mm256_srli_epi32::<4>(both))] {
                        let codes = _mm256_sub_epi32(codes, _mm256_set1_epi32(8));
                        let value = _mm256_cvtepi32_ps(codes);
                        values[i] = if grouped { _mm256_mul_ps(value, scale) } else { value };
                    }
                }
                values
            }
        }
    }

    impl Codes<__m512, 2> for Int8 {
        const BYTES: usize = Bits::Eight.block_bytes();
        #[inline(always)]
        unsafe fn scale(scale: f32) -> __m512 {
            // SAFETY: the caller's features.
            unsafe { _mm512_set1_ps(scale) }
        }
        #[inline(always)]
        unsafe fn values(p: *const u8, scale: __m512, grouped: bool) -> [__m512; 2] {
            // SAFETY: the caller's features; 32 bytes are readable.
            unsafe {
                let mut values = [scale; 2];
                for i in 0..2 {
                    let codes = _mm512_cvtepi8_epi32(_mm_loadu_si128(p.add(16 * i).cast()));
                    let value = _mm512_cvtepi32_ps(codes);
                    values[i] = if grouped { _mm512_mul_ps(value, scale) } else { value };
                }
                values
            }
        }
    }

    /// The sixteen values of a code are looked up: a permutation reads the low four bits of each
    /// index, so the scale is in the table and nothing is masked or converted.
    impl Codes<__m512, 2> for Int4 {
        const BYTES: usize = Bits::Four.block_bytes();
        #[inline(always)]
        unsafe fn scale(scale: f32) -> __m512 {
            // SAFETY: the caller's features.
            unsafe {
                let table = _mm512_setr_ps(
                    -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0,
                    6.0, 7.0,
                );
                _mm512_mul_ps(table, _mm512_set1_ps(scale))
            }
        }
        #[inline(always)]
        unsafe fn values(p: *const u8, table: __m512, _: bool) -> [__m512; 2] {
            // SAFETY: the caller's features; 16 bytes are readable.
            unsafe {
                let both = _mm512_cvtepu8_epi32(_mm_loadu_si128(p.cast()));
                let high = _mm512_srli_epi32::<4>(both);
                [_mm512_permutexvar_ps(both, table), _mm512_permutexvar_ps(high, table)]
            }
        }
    }
}
