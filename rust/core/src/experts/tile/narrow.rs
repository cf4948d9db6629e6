//! Dot products of few rows of bf16 with codes, in integers: twice as many multiplications per
//! instruction as in `f32`, which 4-bit codes need to keep up with memory.
//!
//! Each row of x is cut into segments of up to 256 values, and each segment is rounded to 15 bits
//! and a sign below its largest magnitude: finer than bf16 itself for all values down to 1/128 of
//! that. Rows whose other values would lose more than bf16 does, for an outlier beside them, are
//! not taken. Sums of products are exact until they are scaled.
//!
//! One kernel of AVX2 serves AVX-512 too: with it codes come from memory slower than they are
//! multiplied.
#![allow(unsafe_code, reason = "vector loads and calls for CPU features that were detected")]

use super::DOT_ROWS;
use crate::arena::{self, Scratch};
use crate::experts::codes::{BLOCK, Bits};
use crate::isa::Isa;
use crate::simd::{self, Job};

/// Blocks of a segment, except for the last one of a group: their sums cannot overflow.
const SEGMENT: usize = 8;

/// Rows of x as integers.
pub(in crate::experts) struct Narrow {
    values: Scratch<i16>,
    /// Values of a row, padded to whole blocks.
    len: usize,
    /// Segments of a row.
    segments: usize,
    groups: usize,
    scales: Vec<f32>,
    /// What a segment's sum with 4-bit codes begins with, which stand 8 above their value.
    starts: Vec<i32>,
}

impl Narrow {
    /// The rows, whose padded length is a multiple of whole blocks for each of `groups`; `None` if
    /// a value is not finite, or outliers leave too little of the rest.
    pub(in crate::experts) fn new(rows: &[&[f32]], groups: usize) -> Option<Self> {
        let len = rows[0].len();
        let group = len / groups;
        let segments = groups * group.div_ceil(SEGMENT * BLOCK);
        let mut narrow = Self {
            values: arena::take(rows.len() * len),
            len,
            segments,
            groups,
            scales: Vec::with_capacity(rows.len() * segments),
            starts: Vec::with_capacity(rows.len() * segments),
        };
        simd::widest(Round { rows, group, narrow: &mut narrow }).then_some(narrow)
    }

    fn row(&self, row: usize) -> (&[i16], &[f32], &[i32]) {
        let (values, of) = (row * self.len..(row + 1) * self.len, row * self.segments);
        let of = of..of + self.segments;
        (&self.values[values], &self.scales[of.clone()], &self.starts[of])
    }
}

struct Round<'a> {
    rows: &'a [&'a [f32]],
    group: usize,
    narrow: &'a mut Narrow,
}

impl Job for Round<'_> {
    /// Whether integers hold the values well.
    type Output = bool;

    #[inline(always)]
    fn run(self) -> bool {
        let Self { rows, group, narrow } = self;
        for (row, out) in rows.iter().zip(narrow.values.chunks_exact_mut(narrow.len.max(1))) {
            let groups = row.chunks(group.max(1)).zip(out.chunks_mut(group.max(1)));
            for (x, out) in groups
                .flat_map(|(x, out)| x.chunks(SEGMENT * BLOCK).zip(out.chunks_mut(SEGMENT * BLOCK)))
            {
                // Magnitudes are ordered as their bits are, NaN above all.
                let largest = x.iter().fold(0, |most, x| most.max(x.abs().to_bits()));
                let largest = f32::from_bits(largest);
                if !largest.is_finite() {
                    return false;
                }
                let most = f32::from(i16::MAX);
                let (mut scale, mut inverse) = (largest / most, most / largest);
                if !inverse.is_finite() {
                    (scale, inverse) = (0.0, 0.0); // nothing, or nearly
                }
                if loses(x, largest / FINE, scale) {
                    return false;
                }
                let mut sum = 0;
                for (out, x) in out.iter_mut().zip(x) {
                    *out = (x * inverse).round_ties_even() as i16;
                    sum += i32::from(*out);
                }
                narrow.scales.push(scale);
                narrow.starts.push(-8 * sum);
            }
        }
        true
    }
}

/// Values above this part of the largest lose no more than bf16 does.
const FINE: f32 = 128.0;

/// Whether rounding to steps of `scale` moves what lies below `small` by more than bf16's own step,
/// 1/256 of a value, in the mean.
#[inline(always)]
fn loses(x: &[f32], small: f32, scale: f32) -> bool {
    let (mut squares, mut count) = ([0.0f32; BLOCK], [0.0f32; BLOCK]);
    for x in x.as_chunks::<BLOCK>().0 {
        for lane in 0..BLOCK {
            let below = x[lane].abs() < small && x[lane] != 0.0;
            let below = f32::from(u8::from(below));
            squares[lane] += below * (x[lane] * x[lane]);
            count[lane] += below;
        }
    }
    let (squares, count): (f32, f32) = (squares.iter().sum(), count.iter().sum());
    count * (scale * scale / 12.0) > squares / (256.0 * 256.0)
}

/// The dot products for one kind of codes.
pub(in crate::experts) struct Dot {
    bits: Bits,
    #[allow(clippy::type_complexity, reason = "the signature of the method of its name")]
    run: unsafe fn(&Narrow, std::ops::Range<usize>, &[&[u8]], &[&[f32]], &mut [f32]),
}

/// Weight rows that one call takes, with up to half of [`DOT_ROWS`].
const STREAMS: usize = 4;

impl Dot {
    /// For codes of an instruction set, where it has vectors.
    pub(in crate::experts) fn of(isa: Isa, bits: Bits) -> Option<&'static Self> {
        #[cfg(target_arch = "x86_64")]
        if isa >= Isa::Avx2 {
            return Some(match bits {
                Bits::Eight => &x86::INT8,
                Bits::Four => &x86::INT4,
            });
        }
        let _ = (isa, bits);
        None
    }

    /// Weight rows that a call with this many rows of x takes: as many as the registers hold.
    pub(in crate::experts) fn streams(rows: usize) -> usize {
        if rows > DOT_ROWS / 2 { STREAMS / 2 } else { STREAMS }
    }

    /// `out[m][s] = x[m] · w[s]` for some rows of x; rows of `out` are `streams(rows.len())` wide.
    pub(in crate::experts) fn dot(
        &self,
        x: &Narrow,
        rows: std::ops::Range<usize>,
        codes: &[&[u8]],
        scales: &[&[f32]],
        out: &mut [f32],
    ) {
        let streams = Self::streams(rows.len());
        assert!((1..=DOT_ROWS).contains(&rows.len()) && (1..=streams).contains(&codes.len()));
        assert!(x.groups > 0 && x.len.is_multiple_of(BLOCK * x.groups));
        assert!(rows.end * x.len <= x.values.len());
        assert!(x.scales.len() >= rows.end * x.segments && x.starts.len() == x.scales.len());
        let bytes = x.len / BLOCK * self.bits.block_bytes();
        assert!(codes.iter().all(|codes| codes.len() == bytes));
        assert!(scales.len() == codes.len() && scales.iter().all(|s| s.len() == x.groups));
        assert!(out.len() >= rows.len() * streams);
        // SAFETY: `of` was asked for the CPU's own instruction set; lengths as asserted.
        unsafe { (self.run)(x, rows, codes, scales, out) }
    }
}

#[cfg(target_arch = "x86_64")]
#[allow(
    clippy::wildcard_imports,
    clippy::needless_range_loop,
    reason = "intrinsics by the dozen; loops over registers keep one index for all arrays"
)]
mod x86 {
    use super::super::lanes::{Lanes, by_dot_rows};
    use super::{BLOCK, Bits, Dot, Narrow, SEGMENT, STREAMS};
    use std::arch::x86_64::*;
    use std::ops::Range;

    pub(super) static INT8: Dot = Dot { bits: Bits::Eight, run: dot::<false> };
    pub(super) static INT4: Dot = Dot { bits: Bits::Four, run: dot::<true> };

    /// # Safety
    ///
    /// The CPU has the features; lengths as `Dot::dot` asserts.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dot<const FOUR: bool>(
        x: &Narrow,
        rows: Range<usize>,
        codes: &[&[u8]],
        scales: &[&[f32]],
        out: &mut [f32],
    ) {
        // SAFETY: by this function's contract.
        by_dot_rows!(rows.len(), STREAMS, |M, W| unsafe {
            products::<FOUR, M, W>(x, rows.start, codes, scales, out.as_mut_ptr());
        });
    }

    /// # Safety
    ///
    /// The CPU has AVX2; lengths as `Dot::dot` asserts, `out` holds `M * W`.
    #[inline(always)]
    unsafe fn products<const FOUR: bool, const M: usize, const W: usize>(
        x: &Narrow,
        first: usize,
        codes: &[&[u8]],
        scales: &[&[f32]],
        out: *mut f32,
    ) {
        // SAFETY: by this function's contract; blocks end with their rows, and there are as many
        // segments as the loops below count.
        unsafe {
            let mut xs = [std::ptr::null::<i16>(); M];
            let (mut x_scales, mut starts) = ([std::ptr::null(); M], [std::ptr::null(); M]);
            for m in 0..M {
                let (values, scales, sums) = x.row(first + m);
                (xs[m], x_scales[m], starts[m]) = (values.as_ptr(), scales.as_ptr(), sums.as_ptr());
            }
            let (mut ws, mut w_scales) = ([std::ptr::null::<u8>(); W], [std::ptr::null(); W]);
            for s in 0..W {
                // A short call reads its last row again.
                let row = s.min(codes.len() - 1);
                ws[s] = codes.get_unchecked(row).as_ptr();
                w_scales[s] = scales.get_unchecked(row).as_ptr();
            }
            let block_bytes = if FOUR { BLOCK / 2 } else { BLOCK };
            let mut total = [[_mm256_setzero_ps(); W]; M];
            let (mut block, mut segment) = (0, 0);
            for group in 0..x.groups {
                let end = block + x.len / BLOCK / x.groups;
                while block < end {
                    let mut sum = [[_mm256_setzero_si256(); W]; M];
                    if FOUR {
                        for m in 0..M {
                            let start = _mm_cvtsi32_si128(*starts[m].add(segment));
                            sum[m] = [_mm256_zextsi128_si256(start); W];
                        }
                    }
                    for block in block..(block + SEGMENT).min(end) {
                        for s in 0..W {
                            let w = halves::<FOUR>(ws[s].add(block * block_bytes));
                            for r in 0..2 {
                                for m in 0..M {
                                    let x = xs[m].add(block * BLOCK + r * BLOCK / 2);
                                    let x = _mm256_loadu_si256(x.cast());
                                    let products = _mm256_madd_epi16(w[r], x);
                                    sum[m][s] = _mm256_add_epi32(sum[m][s], products);
                                }
                            }
                        }
                    }
                    block = (block + SEGMENT).min(end);
                    for s in 0..W {
                        let w_scale: f32 = *w_scales[s].add(group);
                        for m in 0..M {
                            let scale = _mm256_set1_ps(w_scale * *x_scales[m].add(segment));
                            let value = _mm256_cvtepi32_ps(sum[m][s]);
                            total[m][s] = value.mul_add(scale, total[m][s]);
                        }
                    }
                    segment += 1;
                }
            }
            for m in 0..M {
                <__m256 as Lanes>::sums(&total[m], out.add(m * W));
            }
        }
    }

    /// The first and second half of a block, 8 above their value if of 4 bits.
    ///
    /// # Safety
    ///
    /// The CPU has AVX2; a block is readable.
    #[inline(always)]
    unsafe fn halves<const FOUR: bool>(p: *const u8) -> [__m256i; 2] {
        // SAFETY: by this function's contract.
        unsafe {
            let first = _mm_loadu_si128(p.cast());
            if FOUR {
                let both = _mm256_cvtepu8_epi16(first);
                let low = _mm256_and_si256(both, _mm256_set1_epi16(15));
                return [low, _mm256_srli_epi16::<4>(both)];
            }
            let second = _mm_loadu_si128(p.add(BLOCK / 2).cast());
            [_mm256_cvtepi8_epi16(first), _mm256_cvtepi8_epi16(second)]
        }
    }
}
