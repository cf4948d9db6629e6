//! Weights as codes of 8 or 4 bits, with a scale for each row or for each group along it.
//!
//! A code is a signed integer, its weight the code times the scale. A row of k weights is cut into
//! blocks of 32, the last one filled up with zeros. A block of 8-bit codes is 32 bytes. In a block
//! of 4-bit codes byte i holds code i in its low half and code 16 + i in its high half, so that one
//! load widens into neighbours along k twice; both stand 8 above their value, so never below 0.

use crate::Element;
use crate::dtype::Accumulator;
use crate::error::{Error, Result, check_shape};
use crate::simd::{self, Job};
use std::ops::Range;

/// Codes that lie together.
pub const BLOCK: usize = 32;

/// Size of a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bits {
    /// A byte each.
    Eight,
    /// Two in a byte.
    Four,
}

impl Bits {
    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::Eight => BLOCK,
            Self::Four => BLOCK / 2,
        }
    }

    /// Bytes of a row of `k` weights.
    pub const fn row_bytes(self, k: usize) -> usize {
        k.div_ceil(BLOCK) * self.block_bytes()
    }
}

/// The codes of a matrix, row by row.
#[derive(Debug, Clone, Copy)]
pub struct Codes<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) scales: &'a [f32],
    pub(super) bits: Bits,
    k: usize,
    /// Weights that share a scale: a whole row, or a multiple of [`BLOCK`].
    group: usize,
}

impl<'a> Codes<'a> {
    /// Checks that codes and scales are those of a matrix `[n, k]`; without a group there is one
    /// scale for each row.
    ///
    /// # Errors
    ///
    /// [`Error::Shape`] and [`Error::Value`] name `arg`.
    pub fn new(
        op: &'static str,
        arg: &'static str,
        (bytes, scales): (&'a [u8], &'a [f32]),
        bits: Bits,
        [n, k]: [usize; 2],
        group: Option<usize>,
    ) -> Result<Self> {
        if let Some(group) = group
            && (group == 0 || !group.is_multiple_of(BLOCK) || !k.is_multiple_of(group))
        {
            let expected = format!("have rows of whole groups of a multiple of {BLOCK} weights");
            let got = format!("rows of {k} in groups of {group}");
            return Err(Error::Value { op, arg, expected, got });
        }
        // A row of nothing has one scale, which nothing is multiplied by.
        let group = group.filter(|_| k > 0).unwrap_or(k);
        let codes = Self { bytes, scales, bits, k, group };
        check_shape(op, arg, &[bytes.len()], &[n * bits.row_bytes(k)])?;
        check_shape(op, arg, &[scales.len()], &[n * codes.groups()])?;
        Ok(codes)
    }

    pub(super) fn groups(&self) -> usize {
        if self.group == self.k { 1 } else { self.k / self.group }
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.bits.row_bytes(self.k)
    }

    /// The codes from row `first` on.
    #[must_use]
    pub fn from_row(self, first: usize) -> Self {
        let bytes = self.bytes.get(first * self.row_bytes()..).unwrap_or(&[]);
        let scales = self.scales.get(first * self.groups()..).unwrap_or(&[]);
        Self { bytes, scales, ..self }
    }

    /// Some of the rows.
    pub(super) fn rows(self, rows: Range<usize>) -> Self {
        let (bytes, groups) = (self.row_bytes(), self.groups());
        Self {
            bytes: &self.bytes[rows.start * bytes..rows.end * bytes],
            scales: &self.scales[rows.start * groups..rows.end * groups],
            ..self
        }
    }

    /// Rows: each has a scale at least.
    pub(super) fn len(&self) -> usize {
        self.scales.len() / self.groups()
    }

    fn row(&self, n: usize) -> (&'a [u8], &'a [f32]) {
        let (bytes, groups) = (self.row_bytes(), self.groups());
        (&self.bytes[n * bytes..][..bytes], &self.scales[n * groups..][..groups])
    }

    /// Writes the weights `[rows, cols]`.
    pub(super) fn dequantise<T: Element>(
        &self,
        rows: Range<usize>,
        cols: Range<usize>,
        out: &mut [T],
    ) {
        simd::widest(Dequantise { codes: self, rows, cols, out });
    }
}

struct Dequantise<'a, T> {
    codes: &'a Codes<'a>,
    rows: Range<usize>,
    cols: Range<usize>,
    out: &'a mut [T],
}

impl<T: Element> Job for Dequantise<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        let Self { codes, rows, cols, out } = self;
        let bytes = codes.bits.block_bytes();
        for (n, out) in rows.zip(out.chunks_exact_mut(cols.len().max(1))) {
            let (row, scales) = codes.row(n);
            let blocks = cols.start / BLOCK..cols.end.div_ceil(BLOCK);
            for block in blocks {
                let scale = scales[block * BLOCK / codes.group];
                let weights = match codes.bits {
                    Bits::Eight => eight(&row[block * bytes..][..bytes], scale),
                    Bits::Four => four(&row[block * bytes..][..bytes], scale),
                };
                // Tiles may begin and end inside of a block.
                let from = cols.start.max(block * BLOCK);
                let to = cols.end.min((block + 1) * BLOCK);
                let out = &mut out[from - cols.start..to - cols.start];
                for (out, weight) in out.iter_mut().zip(&weights[from - block * BLOCK..]) {
                    *out = T::round(T::Acc::from_f64((*weight).into()));
                }
            }
        }
    }
}

#[inline(always)]
fn eight(bytes: &[u8], scale: f32) -> [f32; BLOCK] {
    let mut weights = [0.0; BLOCK];
    for (weight, byte) in weights.iter_mut().zip(bytes) {
        *weight = f32::from(byte.cast_signed()) * scale;
    }
    weights
}

#[inline(always)]
fn four(bytes: &[u8], scale: f32) -> [f32; BLOCK] {
    let mut weights = [0.0; BLOCK];
    let (low, high) = weights.split_at_mut(BLOCK / 2);
    for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
        *low = (f32::from(byte & 15) - 8.0) * scale;
        *high = (f32::from(byte >> 4) - 8.0) * scale;
    }
    weights
}
