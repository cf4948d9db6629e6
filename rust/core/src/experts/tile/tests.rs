//! Every tile of this machine against plain sums in f64, at every tail of m, n and k.

use super::*;
use crate::dtype::Accumulator;

/// Small integers and quarters: sums of a few hundred products are exact in every type, so the
/// order of adding does not matter and results must be equal.
fn values<T: Element>(len: usize, seed: usize) -> Vec<T> {
    (0..len)
        .map(|i| {
            let hash = (i * 7 + seed * 13 + i * i % 11) % 17;
            T::round(T::Acc::from_f64((hash as f64 - 8.0) / 4.0))
        })
        .collect()
}

fn slices<T>(all: &[T], width: usize) -> Vec<&[T]> {
    if width == 0 { vec![&[]; 256] } else { all.chunks_exact(width).collect() }
}

fn sum<T: Element, A: Element<Acc = T::Acc>>(a: &[A], b: impl Fn(usize) -> T) -> f64 {
    a.iter().enumerate().map(|(k, a)| a.widen().to_f64() * b(k).widen().to_f64()).sum()
}

const KS: [usize; 14] = [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 77];

fn check<T: Element, A: Operand<T>>(tile: &Tile<T, A>) {
    for k in KS {
        check_panel(tile, k);
        check_stored(tile, k);
        check_dot(tile, k);
    }
    check_axpy(tile);
}

fn check_panel<T: Element, A: Operand<T>>(tile: &Tile<T, A>, k: usize) {
    let x: Vec<A> = values(tile.rows * k, 1);
    let x = slices(&x, k);
    for width in 1..=tile.cols {
        // Stale panels hold anything, not a number included.
        let stale = A::round(A::Acc::from_f64(f64::NAN));
        let mut out = vec![T::Acc::default(); tile.rows * tile.cols];
        let m = width % tile.rows + 1;

        // One slice per column; a second part from the middle on, where it fits.
        let by_row: Vec<T> = values(tile.cols * k, 2);
        let w = &slices(&by_row, k)[..width];
        let mut panel = vec![stale; tile.panel_len(k)];
        let middle = tile.cols / 2;
        tile.pack_rows(&w[..width.min(middle)], k, 0, &mut panel);
        tile.pack_rows(&w[width.min(middle)..], k, middle, &mut panel);
        tile.panel(&x[..m], k, &panel, width, &by_row, &mut out);
        for (row, x) in x[..m].iter().enumerate() {
            for column in 0..width {
                let (got, want) = (out[row * tile.cols + column], sum(x, |k| w[column][k]));
                assert_eq!(got.to_f64(), want, "rows: k {k}, m {m}, column {column} of {width}");
            }
        }

        // One slice per k, in two pieces.
        let by_line: Vec<T> = values(width * k, 3);
        let lines = &slices(&by_line, width)[..k];
        let mut panel = vec![stale; tile.panel_len(k)];
        let cut = width / 3;
        let left: Vec<_> = lines.iter().map(|line| &line[..cut]).collect();
        let right: Vec<_> = lines.iter().map(|line| &line[cut..]).collect();
        tile.pack_cols(&left, 0, &mut panel);
        tile.pack_cols(&right, cut, &mut panel);
        tile.panel(&x[..m], k, &panel, width, &by_row, &mut out);
        for (row, x) in x[..m].iter().enumerate() {
            for column in 0..width {
                let (got, want) = (out[row * tile.cols + column], sum(x, |k| lines[k][column]));
                assert_eq!(got.to_f64(), want, "lines: k {k}, m {m}, column {column} of {width}");
            }
        }
    }
    for m in 1..=tile.rows {
        let w: Vec<T> = values(tile.cols * k, 4);
        let w = slices(&w, k);
        let mut panel = vec![A::default(); tile.panel_len(k)];
        tile.pack_rows(&w[..tile.cols], k, 0, &mut panel);
        let mut out = vec![T::Acc::default(); tile.rows * tile.cols];
        tile.panel(&x[..m], k, &panel, tile.cols, &[], &mut out);
        for (row, x) in x[..m].iter().enumerate() {
            for (column, w) in w[..tile.cols].iter().enumerate() {
                let got = out[row * tile.cols + column].to_f64();
                assert_eq!(got, sum(x, |k| w[k]), "k {k}, m {m}");
            }
        }
    }
}

fn check_stored<T: Element, A: Operand<T>>(tile: &Tile<T, A>, k: usize) {
    let Format { cols, group } = tile.format();
    let w: Vec<T> = values(4 * cols * k, 8);
    let w = slices(&w, k);
    let mut panels = vec![T::default(); 4 * tile.panel_len(k)];
    for (index, w) in w.iter().enumerate().take(4 * cols) {
        let panel = &mut panels[index / cols * tile.panel_len(k)..];
        for (k, w) in w.iter().enumerate() {
            panel[(k / group * cols + index % cols) * group + k % group] = *w;
        }
    }
    let panels: Vec<_> = slices(&panels, tile.panel_len(k)).into_iter().take(4).collect();
    let x: Vec<A> = values(tile.rows * k, 1);
    let x = slices(&x, k);
    for m in 1..=tile.rows {
        for count in 1..=panels_at_once(m) {
            let mut out = vec![T::Acc::default(); count * m * cols];
            tile.stored(&x[..m], k, &panels[..count], panels[0], &mut out);
            for (at, out) in out.iter().enumerate() {
                let (panel, row, column) = (at / cols / m, at / cols % m, at % cols);
                let want = sum(x[row], |k| w[panel * cols + column][k]);
                assert_eq!(out.to_f64(), want, "k {k}, m {m}, column {column} of panel {panel}");
            }
        }
    }
}

fn check_dot<T: Element, A: Operand<T>>(tile: &Tile<T, A>, k: usize) {
    let (x, w) = (values::<A>(DOT_ROWS * k, 5), values::<T>(tile.streams(1) * k, 6));
    let (x, w) = (slices(&x, k), slices(&w, k));
    for m in 1..=DOT_ROWS {
        let streams = tile.streams(m);
        for n in 1..=streams {
            let mut out = vec![T::Acc::default(); m * streams];
            tile.dot(&x[..m], k, &w[..n], m == 2, &mut out);
            for (row, x) in x[..m].iter().enumerate() {
                for (stream, w) in w[..n].iter().enumerate() {
                    let got = out[row * streams + stream].to_f64();
                    assert_eq!(got, sum(x, |k| w[k]), "k {k}, m {m}, n {n}");
                }
            }
        }
    }
}

fn check_axpy<T: Element, A: Operand<T>>(tile: &Tile<T, A>) {
    for n in KS {
        let w = values::<T>(AXPY_ROWS * n, 7);
        let w = slices(&w, n);
        for j in 0..=AXPY_ROWS {
            let x: Vec<T::Acc> = (0..j).map(|j| T::Acc::from_f64(j as f64 - 1.5)).collect();
            let mut out: Vec<_> = (0..n).map(|n| T::Acc::from_f64(n as f64)).collect();
            tile.axpy(&x, &w[..j], &mut out);
            for (n, out) in out.iter().enumerate() {
                let terms = x.iter().zip(&w).map(|(x, w)| x.to_f64() * w[n].widen().to_f64());
                assert_eq!(out.to_f64(), n as f64 + terms.sum::<f64>(), "n {n}, {j} lines");
            }
        }
    }
}

fn check_all<T: Tiled>() {
    for isa in Isa::available() {
        match T::tiles(isa) {
            Choice::Same(tile) => check(tile),
            Choice::Wide(tile, own) => {
                check(tile);
                check(own);
            }
        }
    }
}

#[test]
fn every_tile_of_f64() {
    check_all::<f64>();
}

#[test]
fn every_tile_of_f32() {
    check_all::<f32>();
}

#[test]
fn every_tile_of_bf16() {
    check_all::<bf16>();
}

#[test]
fn every_tile_of_f16() {
    check_all::<f16>();
}
