//! Weights copied, once, into the order in which the tiles read them.
//!
//! A panel holds the columns of a few features, the gates in its first half and the ups in its
//! second, or of as many features as it has columns where there is no up. All sums over stored
//! panels go along k in order, however many rows there are, so they do not depend on the company
//! of a row.

use super::matrix::Projection;
use super::product::{add_biases, even_chunks};
use super::tile::{Choice, Operand, Tile, Tiled, panels_at_once};
use super::weights::Experts;
use crate::chunks::for_each_chunk;
use crate::error::Result;
use crate::{Element, isa};
use std::ops::Range;

/// How a panel lies in memory: `[k / group][cols][group]`, with zeros where k or the features end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Format {
    /// Columns of a panel.
    pub cols: usize,
    /// Along k, values that stand together.
    pub group: usize,
}

impl Format {
    /// What the tiles of this process read.
    ///
    /// # Errors
    ///
    /// As [`isa::chosen`].
    pub fn of<T: Tiled>() -> Result<Self> {
        Ok(match T::tiles(isa::chosen()?) {
            Choice::Same(tile) => tile.format(),
            Choice::Wide(tile, _) => tile.format(),
        })
    }

    /// Shape of the panels of `features` features over `k`, each of `columns` columns.
    pub fn shape(self, features: usize, columns: usize, k: usize) -> [usize; 4] {
        let panels = features.div_ceil(self.cols / columns);
        [panels, k.div_ceil(self.group), self.cols, self.group]
    }

    /// Elements of the panels of a projection.
    pub(super) fn len_of<T>(self, projection: &Projection<'_, T>) -> usize {
        let first = &projection.column(0, 0).0.matrix;
        let features = first.n / projection.per_feature;
        self.shape(features, projection.columns_of_feature(), first.k).iter().product()
    }
}

/// Writes the panels of every expert, in the format of this process.
///
/// # Errors
///
/// As [`isa::chosen`].
///
/// # Panics
///
/// If an output is not of the length that [`Format::shape`] says.
pub fn prepack<T: Tiled>(
    experts: &Experts<'_, T>,
    gate_up: Vec<&mut [T]>,
    down: Vec<&mut [T]>,
) -> Result<()> {
    let format = Format::of::<T>()?;
    for (e, (gate_up, down)) in gate_up.into_iter().zip(down).enumerate() {
        pack(format, &experts.input(e), gate_up);
        pack(format, &experts.output(e), down);
    }
    Ok(())
}

fn pack<T: Element>(format: Format, projection: &Projection<'_, T>, out: &mut [T]) {
    assert_eq!(out.len(), format.len_of(projection));
    if out.is_empty() {
        return;
    }
    let (first, columns) = (&projection.column(0, 0).0.matrix, projection.columns_of_feature());
    let (features, room) = (first.n / projection.per_feature, format.cols / columns);
    let len = format.cols * first.k.next_multiple_of(format.group);
    for_each_chunk(out, len, super::grain(len), |index, panel| {
        panel.fill(T::default());
        let run = index * room..((index + 1) * room).min(features);
        for which in 0..columns {
            pack_columns(format, projection, run.clone(), which, which * room, panel);
        }
    });
}

/// The gates or the ups of a run of features, from column `at` of a panel on.
fn pack_columns<T: Element>(
    format: Format,
    projection: &Projection<'_, T>,
    run: Range<usize>,
    which: usize,
    at: usize,
    panel: &mut [T],
) {
    /// Along k at once, whole groups: what is read and what is written stays in the cache.
    const BLOCK: usize = 32;
    let Format { cols, group } = format;
    let k = projection.column(0, which).0.matrix.k;
    for begin in (0..k).step_by(BLOCK) {
        let lines = begin / group..(begin + BLOCK).min(k).div_ceil(group);
        for (column, feature) in (at..).zip(run.clone()) {
            let (part, n) = projection.column(feature, which);
            for line in lines.clone() {
                let values = &mut panel[(line * cols + column) * group..][..group];
                for (k, value) in (line * group..k).zip(values) {
                    *value = part.matrix.at(n, k);
                }
            }
        }
    }
}

/// [`super::product::product`] over stored panels.
pub(super) fn product<T: Tiled, A: Operand<T>>(
    tile: &Tile<T, A>,
    rows: &[&[A]],
    projection: &Projection<'_, T>,
    panels: &[T],
    features: Range<usize>,
    mut each: impl FnMut(usize, Range<usize>, &mut [T::Acc], &mut [T::Acc]),
) {
    let parts = projection.columns_of_feature();
    let (k, room) = (rows[0].len(), tile.cols / parts);
    let len = tile.panel_len(k);
    assert!(features.start.is_multiple_of(room), "tasks take whole panels");
    let (mut at, end) = (features.start / room, features.end.div_ceil(room));
    let most = panels_at_once(rows.len());
    let mut sums = vec![T::Acc::default(); tile.cols * tile.rows.max(most * 3)];
    while at < end {
        let together = at..(at + most).min(end);
        let list: [&[T]; 4] =
            std::array::from_fn(|s| &panels[(at + s).min(end - 1) * len..][..len]);
        at = together.end;
        // The next panel in two halves, one for each of the first two products to fetch.
        let next = if most == 1 && at < end { &panels[at * len..][..len] } else { &[] };
        let mut ahead = next.chunks(len.div_ceil(2).max(1));
        let mut done = 0;
        for rows in even_chunks(rows, tile.rows) {
            let ahead = ahead.next().unwrap_or(&[]);
            tile.stored(rows, k, &list[..together.len()], ahead, &mut sums);
            let mut lines = sums.chunks_exact_mut(tile.cols);
            for panel in together.clone() {
                let run = panel * room..((panel + 1) * room).min(features.end);
                for (row, line) in (done..done + rows.len()).zip(&mut lines) {
                    let (first, second) = line.split_at_mut(room);
                    let first = &mut first[..run.len()];
                    let second = &mut second[..if parts == 2 { run.len() } else { 0 }];
                    add_biases(projection, &run, first, second);
                    each(row, run.clone(), first, second);
                }
            }
            done += rows.len();
        }
    }
}
