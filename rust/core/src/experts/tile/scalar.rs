//! Any element type on any machine; what the instruction-set files must agree with.

use super::Tile;
use crate::Element;
use crate::experts::activation::{self, Math};
use half::{bf16, f16};

const ROWS: usize = 4;
const COLS: usize = 16;
const STREAMS: usize = 4;

pub(super) static F64: Tile<f64, f64> = tile();
pub(super) static F32: Tile<f32, f32> = tile();
pub(super) static BF16: Tile<bf16, f32> = tile();
pub(super) static F16: Tile<f16, f32> = tile();

const fn tile<T: Element, A: Element<Acc = T::Acc>>() -> Tile<T, A>
where
    T::Acc: Math,
{
    Tile {
        rows: ROWS,
        cols: COLS,
        streams: STREAMS,
        few: 1,
        group: 1,
        panel,
        stored,
        dot,
        axpy,
        pack_rows,
        pack_cols,
        activate: activation::apply,
        gradient: activation::gradient,
    }
}

fn panel<T: Element, A: Element<Acc = T::Acc>>(
    _: &Tile<T, A>,
    rows: &[&[A]],
    k: usize,
    panel: &[A],
    _width: usize,
    _ahead: &[T],
    out: &mut [T::Acc],
) {
    multiply(rows, k, panel, out);
}

fn stored<T: Element, A: Element<Acc = T::Acc>>(
    _: &Tile<T, A>,
    rows: &[&[A]],
    k: usize,
    panels: &[&[T]],
    _ahead: &[T],
    out: &mut [T::Acc],
) {
    for (panel, out) in panels.iter().zip(out.chunks_exact_mut(rows.len() * COLS)) {
        multiply(rows, k, panel, out);
    }
}

fn multiply<A: Element, P: Element<Acc = A::Acc>>(
    rows: &[&[A]],
    k: usize,
    panel: &[P],
    out: &mut [A::Acc],
) {
    for (row, out) in rows.iter().zip(out.chunks_exact_mut(COLS)) {
        let mut sum = [A::Acc::default(); COLS];
        for (a, line) in row[..k].iter().zip(panel.chunks_exact(COLS)) {
            for (sum, b) in sum.iter_mut().zip(line) {
                *sum += a.widen() * b.widen();
            }
        }
        out.copy_from_slice(&sum);
    }
}

fn dot<T: Element, A: Element<Acc = T::Acc>>(
    tile: &Tile<T, A>,
    x: &[&[A]],
    _k: usize,
    w: &[&[T]],
    _ahead: bool,
    out: &mut [T::Acc],
) {
    const LANES: usize = 8;
    for (x, out) in x.iter().zip(out.chunks_mut(tile.streams(x.len()))) {
        for (w, out) in w.iter().zip(out) {
            let mut part = [T::Acc::default(); LANES];
            for (x, w) in x.chunks(LANES).zip(w.chunks(LANES)) {
                for ((part, x), w) in part.iter_mut().zip(x).zip(w) {
                    *part += x.widen() * w.widen();
                }
            }
            *out = part.into_iter().fold(T::Acc::default(), |sum, part| sum + part);
        }
    }
}

fn axpy<T: Element>(x: &[T::Acc], w: &[&[T]], out: &mut [T::Acc]) {
    for (&x, w) in x.iter().zip(w) {
        for (out, w) in out.iter_mut().zip(*w) {
            *out += x * w.widen();
        }
    }
}

fn pack_rows<T: Element, A: Element<Acc = T::Acc>>(
    _: &Tile<T, A>,
    w: &[&[T]],
    _k: usize,
    at: usize,
    panel: &mut [A],
) {
    for (column, w) in (at..).zip(w) {
        for (line, w) in panel.chunks_exact_mut(COLS).zip(*w) {
            line[column] = A::round(w.widen());
        }
    }
}

fn pack_cols<T: Element, A: Element<Acc = T::Acc>>(
    _: &Tile<T, A>,
    w: &[&[T]],
    at: usize,
    panel: &mut [A],
) {
    for (line, w) in panel.chunks_exact_mut(COLS).zip(w) {
        for (out, w) in line[at..].iter_mut().zip(*w) {
            *out = A::round(w.widen());
        }
    }
}
