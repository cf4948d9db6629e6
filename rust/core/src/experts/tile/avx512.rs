//! AVX-512: 6 rows by 64 columns, 24 accumulators of the 32 registers.
#![allow(unsafe_code, reason = "functions of CPU features that Isa::detect has seen")]
#![allow(
    clippy::wildcard_imports,
    clippy::needless_range_loop,
    reason = "intrinsics by the dozen; loops over registers keep one index for all arrays"
)]

use super::Tile;
use super::lanes::{self, Ahead, Lanes, Widen, by_dot_rows, by_panels, by_shape};
use crate::Element;
use crate::experts::activation::{self, Activation};
use half::{bf16, f16};
use std::arch::x86_64::*;

pub(super) const COLS: usize = 64;
pub(super) const STREAMS: usize = 8;

pub(super) static F32: Tile<f32, f32> = tile();
pub(super) static BF16: Tile<bf16, f32> = tile();
pub(super) static F16: Tile<f16, f32> = tile();

const fn tile<T: Element<Acc = f32>>() -> Tile<T, f32>
where
    __m256: Widen<T>,
    __m512: Widen<T>,
{
    Tile {
        rows: 6,
        cols: COLS,
        streams: STREAMS,
        few: 16,
        group: 1,
        panel,
        stored,
        dot,
        axpy,
        pack_rows,
        pack_cols,
        activate,
        gradient,
    }
}

impl Lanes for __m512 {
    const N: usize = 16;
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller's features.
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller's features.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, a: Self, b: Self) -> Self {
        // SAFETY: the caller's features.
        unsafe { _mm512_fmadd_ps(self, a, b) }
    }
    #[inline(always)]
    unsafe fn sums<const W: usize>(registers: &[Self; W], out: *mut f32) {
        // SAFETY: the caller's features; W values are writable.
        unsafe {
            let mut halves = [_mm256_setzero_ps(); W];
            for i in 0..W {
                let high = _mm512_extractf32x8_ps::<1>(registers[i]);
                halves[i] = _mm256_add_ps(_mm512_castps512_ps256(registers[i]), high);
            }
            <__m256 as Lanes>::sums(&halves, out);
        }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller's features; 16 values are readable.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller's features; 16 values are writable.
        unsafe { _mm512_storeu_ps(p, self) }
    }
}

/// A mask of the first `n < 16` lanes.
pub(super) fn first(n: usize) -> u16 {
    (1 << n) - 1
}

impl Widen<f32> for __m512 {
    #[inline(always)]
    unsafe fn widen(p: *const f32) -> Self {
        // SAFETY: the caller's features; 16 values are readable.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn widen_part(p: *const f32, n: usize) -> Self {
        // SAFETY: the caller's features; masked lanes are not touched.
        unsafe { _mm512_maskz_loadu_ps(first(n), p) }
    }
}

impl Widen<bf16> for __m512 {
    #[inline(always)]
    unsafe fn widen(p: *const bf16) -> Self {
        // SAFETY: the caller's features; 16 values are readable.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }
    #[inline(always)]
    unsafe fn widen_part(p: *const bf16, n: usize) -> Self {
        // SAFETY: the caller's features; masked lanes are not touched.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(n), p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }
}

impl Widen<f16> for __m512 {
    #[inline(always)]
    unsafe fn widen(p: *const f16) -> Self {
        // SAFETY: the caller's features; 16 values are readable.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn widen_part(p: *const f16, n: usize) -> Self {
        // SAFETY: the caller's features; masked lanes are not touched.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p.cast())) }
    }
}

// Each function below is `unsafe` for its CPU features and because it trusts the lengths that the
// method of `Tile` of the same name asserts.

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn panel<T: Element<Acc = f32>>(
    _: &Tile<T, f32>,
    rows: &[&[f32]],
    k: usize,
    panel: &[f32],
    width: usize,
    ahead: &[T],
    out: &mut [f32],
) {
    let ahead = Ahead::new(ahead, k);
    let (panel, out) = (panel.as_ptr(), out.as_mut_ptr());
    // SAFETY: lengths as asserted by `Tile::panel`.
    by_shape!(rows.len(), width.div_ceil(16), [1, 2, 3, 4], |M, V| unsafe {
        lanes::panels::<__m512, f32, M, V, 1>(rows, k, [panel], COLS, ahead, out);
    });
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn stored<T: Element<Acc = f32>>(
    _: &Tile<T, f32>,
    rows: &[&[f32]],
    k: usize,
    panels: &[&[T]],
    ahead: &[T],
    out: &mut [f32],
) where
    __m512: Widen<T>,
{
    const V: usize = COLS / 16;
    let ahead = Ahead::new(ahead, k);
    let out = out.as_mut_ptr();
    // SAFETY: lengths as asserted by `Tile::stored`.
    by_panels!(rows.len(), panels.len(), |M, S| unsafe {
        lanes::panels::<__m512, T, M, V, S>(rows, k, lanes::starts(panels), COLS, ahead, out);
    });
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn dot<T: Element<Acc = f32>>(
    _: &Tile<T, f32>,
    x: &[&[f32]],
    k: usize,
    w: &[&[T]],
    ahead: bool,
    out: &mut [f32],
) where
    __m512: Widen<T>,
{
    // SAFETY: lengths as asserted by `Tile::dot`.
    by_dot_rows!(x.len(), STREAMS, |M, W| unsafe {
        lanes::dot::<__m512, T, M, W>(x, k, w, ahead, out.as_mut_ptr());
    });
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn axpy<T: Element<Acc = f32>>(x: &[f32], w: &[&[T]], out: &mut [f32])
where
    __m512: Widen<T>,
{
    // SAFETY: lengths as asserted by `Tile::axpy`.
    unsafe { lanes::axpy::<__m512, T>(x, w, out) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn pack_rows<T: Element<Acc = f32>>(
    _: &Tile<T, f32>,
    w: &[&[T]],
    k: usize,
    at: usize,
    panel: &mut [f32],
) where
    __m256: Widen<T>,
{
    // SAFETY: lengths as asserted by `Tile::pack_rows`.
    unsafe { lanes::pack_rows(w, k, at, panel.as_mut_ptr(), COLS) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn pack_cols<T: Element<Acc = f32>>(
    _: &Tile<T, f32>,
    w: &[&[T]],
    at: usize,
    panel: &mut [f32],
) where
    __m512: Widen<T>,
{
    // SAFETY: lengths as asserted by `Tile::pack_cols`.
    unsafe { lanes::pack_cols::<__m512, T>(w, at, panel.as_mut_ptr(), COLS) }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn activate<A: Element<Acc = f32>>(
    activation: &Activation,
    gate: &[f32],
    up: &[f32],
    out: &mut [A],
) {
    activation::apply(activation, gate, up, out);
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) fn gradient(
    activation: &Activation,
    gate: &mut [f32],
    up: &mut [f32],
    d: &[f32],
    value: &mut [f32],
) {
    activation::gradient(activation, gate, up, d, value);
}
