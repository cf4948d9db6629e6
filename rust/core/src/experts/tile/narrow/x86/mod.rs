//! The instructions: AVX2's, and those that multiply bytes and sum in one go.
//!
//! AVX-512 machines use them on registers of AVX2: codes come from memory slower than they are
//! multiplied.
#![allow(unsafe_code, reason = "vector loads and calls for CPU features that were detected")]
#![allow(
    clippy::wildcard_imports,
    clippy::needless_range_loop,
    reason = "intrinsics by the dozen; loops over registers keep one index for all arrays"
)]

use super::{BLOCK, Bits, Codes, Dot, Form, Narrow, SEGMENT};
use crate::experts::tile::coded::{Products, walk};
use crate::experts::tile::lanes::Lanes;
use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::ops::Range;

mod multiply;

use multiply::{Int4, Int4Vnni, Int8, Int8Vnni, Multiply};

macro_rules! dot {
    ($function:ident, $multiply:ident, $bits:ident, $form:ident) => {
        Dot {
            bits: Bits::$bits,
            form: Form::$form,
            run: [$function::<$multiply, false>, $function::<$multiply, true>],
        }
    };
}
pub(super) static INT8: Dot = dot!(avx2, Int8, Eight, Words);
pub(super) static INT8_VNNI: Dot = dot!(vnni, Int8Vnni, Eight, Bytes);
pub(super) static INT4: Dot = dot!(avx2, Int4, Four, Halves);
pub(super) static INT4_VNNI: Dot = dot!(vnni, Int4Vnni, Four, Halves);

/// # Safety
///
/// The CPU has the features; lengths as `Dot::dot` asserts.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<C: Multiply, const STRADDLES: bool>(
    x: &Narrow,
    rows: Range<usize>,
    codes: &Codes<'_>,
    out: &mut [f32],
    stride: usize,
) {
    // SAFETY: by this function's contract.
    unsafe { dot::<C, STRADDLES>(x, rows, codes, out, stride) }
}

/// # Safety
///
/// The CPU has the features; lengths as `Dot::dot` asserts.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
unsafe fn vnni<C: Multiply, const STRADDLES: bool>(
    x: &Narrow,
    rows: Range<usize>,
    codes: &Codes<'_>,
    out: &mut [f32],
    stride: usize,
) {
    // SAFETY: by this function's contract.
    unsafe { dot::<C, STRADDLES>(x, rows, codes, out, stride) }
}

/// # Safety
///
/// The CPU has the features of `C`; lengths as `Dot::dot` asserts.
#[inline(always)]
unsafe fn dot<C: Multiply, const STRADDLES: bool>(
    x: &Narrow,
    rows: Range<usize>,
    codes: &Codes<'_>,
    out: &mut [f32],
    stride: usize,
) {
    let (out, x) = (out.as_mut_ptr(), Rows::<C, STRADDLES>(x, rows.start, PhantomData));
    // SAFETY: by this function's contract. As many rows of codes as registers hold sums for.
    unsafe {
        match rows.len() {
            1 => walk::<_, 1, 4>(&x, codes, out, stride),
            2 => walk::<_, 2, 2>(&x, codes, out, stride),
            3 => walk::<_, 3, 2>(&x, codes, out, stride),
            _ => unreachable!("at most ROWS"),
        }
    }
}

/// Rows of x from a first one on.
struct Rows<'a, C, const STRADDLES: bool>(&'a Narrow, usize, PhantomData<C>);

impl<C: Multiply, const STRADDLES: bool, const M: usize, const W: usize> Products<M, W>
    for Rows<'_, C, STRADDLES>
{
    #[inline(always)]
    unsafe fn products(
        &self,
        ws: [*const u8; W],
        factors: [*const f32; W],
        groups: usize,
        out: *mut f32,
    ) {
        let Self(x, first, _) = *self;
        // SAFETY: by the trait's contract; units end with their rows, and there are as many
        // segments and groups as the loops below count.
        unsafe {
            let (mut xs, mut scales) = ([x.values.as_ptr(); M], [x.scales.as_ptr(); M]);
            let mut total = [[_mm256_setzero_ps(); W]; M];
            for m in 0..M {
                xs[m] = xs[m].add((first + m) * x.row_bytes());
                scales[m] = scales[m].add((first + m) * x.segments);
                if C::ABOVE {
                    let above = x.above.as_ptr().add((first + m) * groups);
                    for s in 0..W {
                        total[m][s] = less(above, factors[s], groups);
                    }
                }
            }
            let unit_blocks = BLOCK / C::BLOCK_BYTES;
            let (units, whole) = (x.blocks.div_ceil(unit_blocks), x.blocks / unit_blocks);
            let group_blocks = x.blocks / groups;
            let mut scale = [_mm256_setzero_ps(); W];
            if STRADDLES {
                // Each half of a unit is a block.
                let (mut group, mut left) = (0, group_blocks);
                for unit in 0..units {
                    let mut sum = [[C::zero(); W]; M];
                    step::<C, M, W>(&mut sum, ws, xs, unit, whole);
                    let mut halves = [0; 2];
                    for half in &mut halves {
                        *half = group.min(groups - 1);
                        left -= 1;
                        if left == 0 {
                            (group, left) = (group + 1, group_blocks);
                        }
                    }
                    for s in 0..W {
                        let low = _mm256_broadcast_ss(&*factors[s].add(halves[0]));
                        let high = _mm256_broadcast_ss(&*factors[s].add(halves[1]));
                        scale[s] = _mm256_blend_ps::<0xf0>(low, high);
                    }
                    let segment = unit * unit_blocks / SEGMENT;
                    scaled::<C, M, W>(&mut total, &sum, scales, segment, scale);
                }
            } else {
                let (mut unit, mut segment) = (0, 0);
                for group in 0..groups {
                    let end = unit + group_blocks.div_ceil(unit_blocks);
                    for s in 0..W {
                        scale[s] = _mm256_broadcast_ss(&*factors[s].add(group));
                    }
                    while unit < end {
                        let stop = end.min(unit + SEGMENT / unit_blocks);
                        let mut sum = [[C::zero(); W]; M];
                        for unit in unit..stop.min(whole) {
                            step::<C, M, W>(&mut sum, ws, xs, unit, usize::MAX);
                        }
                        if stop > whole {
                            step::<C, M, W>(&mut sum, ws, xs, whole, whole);
                        }
                        scaled::<C, M, W>(&mut total, &sum, scales, segment, scale);
                        (unit, segment) = (stop, segment + 1);
                    }
                }
            }
            for m in 0..M {
                <__m256 as Lanes>::sums(&total[m], out.add(m * W));
            }
        }
    }
}

/// Adds the products of a unit of codes, of which those from `whole` on are half ones.
///
/// # Safety
///
/// The CPU has the features of `C`; the units are readable.
#[inline(always)]
unsafe fn step<C: Multiply, const M: usize, const W: usize>(
    sum: &mut [[C::Sum; W]; M],
    ws: [*const u8; W],
    xs: [*const u8; M],
    unit: usize,
    whole: usize,
) {
    for s in 0..W {
        // SAFETY: by this function's contract.
        unsafe {
            let p = ws[s].add(unit * BLOCK);
            let codes = C::decode(if unit < whole {
                _mm256_loadu_si256(p.cast())
            } else {
                _mm256_zextsi128_si256(_mm_loadu_si128(p.cast()))
            });
            for m in 0..M {
                sum[m][s] = C::add(sum[m][s], codes, xs[m].add(unit * C::X_BYTES));
            }
        }
    }
}

/// Adds sums times the scales of a segment of each row of x and of each row of codes.
///
/// # Safety
///
/// The CPU has the features of `C`; there is such a segment.
#[inline(always)]
unsafe fn scaled<C: Multiply, const M: usize, const W: usize>(
    total: &mut [[__m256; W]; M],
    sum: &[[C::Sum; W]; M],
    scales: [*const f32; M],
    segment: usize,
    factors: [__m256; W],
) {
    for m in 0..M {
        // SAFETY: by this function's contract.
        unsafe {
            let scale = _mm256_broadcast_ss(&*scales[m].add(segment));
            for s in 0..W {
                let value = _mm256_cvtepi32_ps(C::sum(sum[m][s]));
                let value = _mm256_mul_ps(value, scale);
                total[m][s] = value.mul_add(factors[s], total[m][s]);
            }
        }
    }
}

/// `-Σ above[g] · factors[g]`, in any lanes.
///
/// # Safety
///
/// The CPU has AVX2 and FMA; there are so many `groups`.
#[inline(always)]
unsafe fn less(above: *const f32, factors: *const f32, groups: usize) -> __m256 {
    // SAFETY: by this function's contract.
    unsafe {
        let (mut sum, mut at) = (_mm256_setzero_ps(), 0);
        while at + 8 <= groups {
            let factors = _mm256_loadu_ps(factors.add(at));
            sum = _mm256_fnmadd_ps(_mm256_loadu_ps(above.add(at)), factors, sum);
            at += 8;
        }
        let mut rest = 0.0;
        for at in at..groups {
            rest -= *above.add(at) * *factors.add(at);
        }
        _mm256_add_ps(sum, _mm256_zextps128_ps256(_mm_set_ss(rest)))
    }
}
