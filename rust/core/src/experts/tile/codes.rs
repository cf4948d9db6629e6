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
use crate::experts::codes::{BLOCK, Bits, Codes};
use crate::isa::Isa;

/// The dot products for one kind of codes.
pub struct Dot {
    bits: Bits,
    #[allow(clippy::type_complexity, reason = "the signature of the method of its name")]
    run: unsafe fn(&[&[f32]], &Codes<'_>, &mut [f32], usize),
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

    /// `out[m * stride + n] = x[m] · codes[n]` for up to [`DOT_ROWS`] rows of x, which are padded
    /// to whole blocks.
    pub(in crate::experts) fn dot(
        &self,
        x: &[&[f32]],
        codes: &Codes<'_>,
        out: &mut [f32],
        stride: usize,
    ) {
        let (len, groups) = (x[0].len(), codes.groups());
        assert!((1..=DOT_ROWS).contains(&x.len()) && len.is_multiple_of(BLOCK * groups));
        assert!(x.iter().all(|x| x.len() == len));
        assert!(codes.bits == self.bits && codes.row_bytes() == self.bits.row_bytes(len));
        assert!(out.len() >= (x.len() - 1) * stride + codes.len());
        // SAFETY: `of` was asked for the CPU's own instruction set; lengths as asserted.
        unsafe { (self.run)(x, codes, out, stride) }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::super::coded::{Products, walk};
    use super::super::lanes::{Lanes, by_dot_rows};
    use super::{BLOCK, Bits, Codes, Dot};
    use std::arch::x86_64::*;
    use std::marker::PhantomData;

    macro_rules! table {
        ($function:ident) => {
            [
                Dot { bits: Bits::Eight, run: $function::<Int8, false> },
                Dot { bits: Bits::Eight, run: $function::<Int8, true> },
                Dot { bits: Bits::Four, run: $function::<Int4, false> },
                Dot { bits: Bits::Four, run: $function::<Int4, true> },
            ]
        };
    }
    /// Rows of codes at once, with up to half of `DOT_ROWS`: as many as the registers hold.
    const STREAMS_256: usize = 4;
    const STREAMS_512: usize = 8;
    pub(super) static AVX2: [Dot; 4] = table!(dot_256);
    pub(super) static AVX512: [Dot; 4] = table!(dot_512);

    /// # Safety
    ///
    /// The CPU has the features; lengths as `Dot::dot` asserts.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dot_256<C: Decode<__m256, 4>, const GROUPED: bool>(
        x: &[&[f32]],
        codes: &Codes<'_>,
        out: &mut [f32],
        stride: usize,
    ) {
        let (out, rows) = (out.as_mut_ptr(), Rows::<C, __m256, 4, GROUPED>(x, PhantomData));
        // SAFETY: by this function's contract.
        by_dot_rows!(x.len(), STREAMS_256, |M, W| unsafe {
            walk::<_, M, W>(&rows, codes, out, stride);
        });
    }

    /// # Safety
    ///
    /// The CPU has the features; lengths as `Dot::dot` asserts.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn dot_512<C: Decode<__m512, 2>, const GROUPED: bool>(
        x: &[&[f32]],
        codes: &Codes<'_>,
        out: &mut [f32],
        stride: usize,
    ) {
        let (out, rows) = (out.as_mut_ptr(), Rows::<C, __m512, 2, GROUPED>(x, PhantomData));
        // SAFETY: by this function's contract.
        by_dot_rows!(x.len(), STREAMS_512, |M, W| unsafe {
            walk::<_, M, W>(&rows, codes, out, stride);
        });
    }

    /// Rows of x, and what multiplies them.
    struct Rows<'a, C, L, const R: usize, const GROUPED: bool>(
        &'a [&'a [f32]],
        PhantomData<(C, L)>,
    );

    impl<C, L, const R: usize, const M: usize, const W: usize, const GROUPED: bool> Products<M, W>
        for Rows<'_, C, L, R, GROUPED>
    where
        C: Decode<L, R>,
        L: Lanes,
    {
        #[inline(always)]
        unsafe fn products(
            &self,
            ws: [*const u8; W],
            factors: [*const f32; W],
            groups: usize,
            out: *mut f32,
        ) {
            let x = self.0;
            // SAFETY: by the trait's contract; blocks end with their rows.
            unsafe {
                let blocks = x[0].len() / BLOCK;
                let mut xs = [std::ptr::null::<f32>(); M];
                for m in 0..M {
                    xs[m] = x.get_unchecked(m).as_ptr();
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
    }

    /// Codes of a block as `R` registers of `f32`.
    trait Decode<L, const R: usize> {
        /// Bytes of a block.
        const BYTES: usize;
        /// What `values` wants to know of a scale.
        unsafe fn scale(scale: f32) -> L;
        /// The codes at `p`, times their scale where they are `grouped`.
        unsafe fn values(p: *const u8, scale: L, grouped: bool) -> [L; R];
    }

    struct Int8;
    struct Int4;

    impl Decode<__m256, 4> for Int8 {
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

    impl Decode<__m256, 4> for Int4 {
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

    impl Decode<__m512, 2> for Int8 {
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
    impl Decode<__m512, 2> for Int4 {
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
