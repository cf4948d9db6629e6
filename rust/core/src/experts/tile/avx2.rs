//! AVX2 with FMA and F16C: 6 rows by 16 columns, 12 accumulators of the 16 registers.
#![allow(unsafe_code, reason = "functions of CPU features that Isa::detect has seen")]

use super::Tile;
use super::lanes::{self, Ahead, Widen, by_dot_rows, by_panels, by_shape};
use crate::Element;
use crate::experts::activation::{self, Activation};
use half::{bf16, f16};
use std::arch::x86_64::__m256;

const COLS: usize = 16;
const STREAMS: usize = 4;

pub(super) static F32: Tile<f32, f32> = tile();
pub(super) static BF16: Tile<bf16, f32> = tile();
pub(super) static F16: Tile<f16, f32> = tile();

const fn tile<T: Element<Acc = f32>>() -> Tile<T, f32>
where
    __m256: Widen<T>,
{
    Tile {
        rows: 6,
        cols: COLS,
        streams: STREAMS,
        few: 12,
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

// Each function below is `unsafe` for its CPU features and because it trusts the lengths that the
// method of `Tile` of the same name asserts.

#[target_feature(enable = "avx2,fma,f16c")]
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
    by_shape!(rows.len(), width.div_ceil(8), [1, 2], |M, V| unsafe {
        lanes::panels::<__m256, f32, M, V, 1>(rows, k, [panel], COLS, ahead, out);
    });
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn stored<T: Element<Acc = f32>>(
    _: &Tile<T, f32>,
    rows: &[&[f32]],
    k: usize,
    panels: &[&[T]],
    ahead: &[T],
    out: &mut [f32],
) where
    __m256: Widen<T>,
{
    const V: usize = COLS / 8;
    let ahead = Ahead::new(ahead, k);
    let out = out.as_mut_ptr();
    // SAFETY: lengths as asserted by `Tile::stored`.
    by_panels!(rows.len(), panels.len(), |M, S| unsafe {
        lanes::panels::<__m256, T, M, V, S>(rows, k, lanes::starts(panels), COLS, ahead, out);
    });
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot<T: Element<Acc = f32>>(
    _: &Tile<T, f32>,
    x: &[&[f32]],
    k: usize,
    w: &[&[T]],
    ahead: bool,
    out: &mut [f32],
) where
    __m256: Widen<T>,
{
    // SAFETY: lengths as asserted by `Tile::dot`.
    by_dot_rows!(x.len(), STREAMS, |M, W| unsafe {
        lanes::dot::<__m256, T, M, W>(x, k, w, ahead, out.as_mut_ptr());
    });
}

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn axpy<T: Element<Acc = f32>>(x: &[f32], w: &[&[T]], out: &mut [f32])
where
    __m256: Widen<T>,
{
    // SAFETY: lengths as asserted by `Tile::axpy`.
    unsafe { lanes::axpy::<__m256, T>(x, w, out) }
}

#[target_feature(enable = "avx2,fma,f16c")]
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

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn pack_cols<T: Element<Acc = f32>>(
    _: &Tile<T, f32>,
    w: &[&[T]],
    at: usize,
    panel: &mut [f32],
) where
    __m256: Widen<T>,
{
    // SAFETY: lengths as asserted by `Tile::pack_cols`.
    unsafe { lanes::pack_cols::<__m256, T>(w, at, panel.as_mut_ptr(), COLS) }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn activate(activation: &Activation, gate: &[f32], up: &[f32], out: &mut [f32]) {
    activation::apply(activation, gate, up, out);
}

#[target_feature(enable = "avx2,fma,f16c")]
fn gradient(
    activation: &Activation,
    gate: &mut [f32],
    up: &mut [f32],
    d: &[f32],
    value: &mut [f32],
) {
    activation::gradient(activation, gate, up, d, value);
}
