//! Dot products of few rows of bf16 with codes, in integers: several times as many multiplications
//! per instruction as in `f32`, which 4-bit codes need to keep up with memory.
//!
//! Each row of x is cut into segments of up to 256 values, and each segment is rounded to 15 bits
//! and a sign below its largest magnitude: finer than bf16 itself for all values down to 1/128 of
//! that. Rows whose other values would lose more than bf16 does, for an outlier beside them, are
//! not taken. Sums of products are exact until they are scaled.
#![cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "what only the instructions read")
)]

use crate::arena::{self, Scratch};
use crate::experts::codes::{BLOCK, Bits, Codes};
use crate::isa::Isa;
use crate::simd::{self, Job};
use std::ops::Range;

#[cfg(target_arch = "x86_64")]
mod x86;

/// Rows of x that one call takes.
pub(in crate::experts) const ROWS: usize = 3;

/// Blocks of a segment, except for the last one of a stretch: their sums cannot overflow.
const SEGMENT: usize = 8;

/// Largest magnitude of a rounded value: its high byte is at most 127.
const MOST: f32 = 32639.0;

/// Added to it, a magnitude below 2^15 loses its digits behind the point: as `f32` has none there.
const WHOLE: f32 = (3 << 22) as f32;

/// The dot products for one kind of codes.
pub(in crate::experts) struct Dot {
    bits: Bits,
    form: Form,
    /// For groups of whole units of codes, and for others.
    #[allow(clippy::type_complexity, reason = "the signature of the method of its name")]
    run: [unsafe fn(&Narrow, Range<usize>, &Codes<'_>, &mut [f32], usize); 2],
}

/// How rounded values lie, so that they meet their codes. A unit is what belongs to 32 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// As they are: 16 bits each.
    Words,
    /// High bytes of a unit, which is a block, then low bytes.
    Bytes,
    /// First halves of the two blocks of a unit, then second halves, each as high and low bytes.
    Halves,
}

impl Form {
    /// Blocks of a unit.
    fn blocks(self) -> usize {
        if self == Self::Halves { 2 } else { 1 }
    }

    /// What multiplies the values stands so much above the codes.
    fn above(self) -> i32 {
        match self {
            Self::Words => 0,
            Self::Bytes => 128,
            Self::Halves => 8,
        }
    }

    /// Writes block number `block` of a row.
    #[inline(always)]
    fn write(self, block: usize, values: &[i16; BLOCK], row: &mut [u8]) {
        let (mut high, mut low) = ([0; BLOCK], [0; BLOCK]);
        for i in 0..BLOCK {
            high[i] = ((values[i] + 128) >> 8).cast_unsigned() as u8;
            low[i] = values[i].cast_unsigned() as u8;
        }
        match self {
            Self::Words => {
                let out = &mut row[2 * BLOCK * block..][..2 * BLOCK];
                for (i, value) in values.iter().enumerate() {
                    [out[2 * i], out[2 * i + 1]] = value.to_ne_bytes();
                }
            }
            Self::Bytes => {
                let out = &mut row[2 * BLOCK * block..][..2 * BLOCK];
                out[..BLOCK].copy_from_slice(&high);
                out[BLOCK..].copy_from_slice(&low);
            }
            Self::Halves => {
                const HALF: usize = BLOCK / 2;
                let (out, _) = row[4 * BLOCK * (block / 2)..].as_chunks_mut::<HALF>();
                let (high, _) = high.as_chunks();
                let (low, _) = low.as_chunks();
                for half in 0..2 {
                    out[4 * half + block % 2] = high[half];
                    out[4 * half + 2 + block % 2] = low[half];
                }
            }
        }
    }
}

impl Dot {
    /// For codes of an instruction set, where it has vectors.
    pub(in crate::experts) fn of(isa: Isa, bits: Bits) -> Option<&'static Self> {
        #[cfg(target_arch = "x86_64")]
        if isa >= Isa::Avx2 {
            let vnni = isa >= Isa::Avx512 && std::is_x86_feature_detected!("avx512vnni");
            return Some(match (bits, vnni) {
                (Bits::Eight, false) => &x86::INT8,
                (Bits::Eight, true) => &x86::INT8_VNNI,
                (Bits::Four, false) => &x86::INT4,
                (Bits::Four, true) => &x86::INT4_VNNI,
            });
        }
        let _ = (isa, bits);
        None
    }

    /// `out[m * stride + n] = x[m] · codes[n]` for up to [`ROWS`] rows of x.
    pub(in crate::experts) fn dot(
        &self,
        x: &Narrow,
        rows: Range<usize>,
        codes: &Codes<'_>,
        out: &mut [f32],
        stride: usize,
    ) {
        assert!((1..=ROWS).contains(&rows.len()) && rows.end <= x.rows && x.form == self.form);
        assert!(codes.bits == self.bits && codes.groups() == x.groups);
        assert!(codes.row_bytes() == x.blocks * self.bits.block_bytes());
        assert!(out.len() >= (rows.len() - 1) * stride + codes.len());
        // SAFETY: `of` was asked for the CPU's own instruction set; lengths as asserted.
        unsafe { (self.run[usize::from(x.straddles())])(x, rows, codes, out, stride) }
    }
}

/// Rows of x as integers.
pub(in crate::experts) struct Narrow {
    values: Scratch<u8>,
    form: Form,
    rows: usize,
    /// Blocks of a row.
    blocks: usize,
    groups: usize,
    /// Segments of a row.
    segments: usize,
    /// By row and segment.
    scales: Vec<f32>,
    /// By row and group, what its products are too large by, over the group's scale.
    above: Vec<f32>,
}

impl Narrow {
    /// The rows, whose padded length is a multiple of whole blocks for each of `groups`; `None` if
    /// a value is not finite, or outliers leave too little of the rest.
    pub(in crate::experts) fn new(dot: &Dot, x: &[&[f32]], groups: usize) -> Option<Self> {
        let (form, rows, blocks) = (dot.form, x.len(), x[0].len() / BLOCK);
        let mut narrow = Self {
            values: arena::take(0),
            form,
            rows,
            blocks,
            groups,
            segments: 0,
            scales: Vec::new(),
            above: vec![0.0; rows * groups],
        };
        narrow.segments = (blocks / narrow.stretch().max(1)) * narrow.stretch().div_ceil(SEGMENT);
        narrow.scales.reserve(rows * narrow.segments);
        narrow.values = arena::take(rows * narrow.row_bytes());
        simd::widest(Round { x, narrow: &mut narrow }).then_some(narrow)
    }

    /// Whether groups end inside of units.
    fn straddles(&self) -> bool {
        self.groups > 1 && !(self.blocks / self.groups).is_multiple_of(self.form.blocks())
    }

    /// Blocks whose segments go together: a group's, unless a unit has several.
    fn stretch(&self) -> usize {
        if self.straddles() { self.blocks } else { self.blocks / self.groups }
    }

    fn row_bytes(&self) -> usize {
        2 * BLOCK * self.blocks.next_multiple_of(self.form.blocks())
    }
}

struct Round<'a> {
    x: &'a [&'a [f32]],
    narrow: &'a mut Narrow,
}

impl Job for Round<'_> {
    /// Whether integers hold the values well.
    type Output = bool;

    #[inline(always)]
    fn run(self) -> bool {
        let Narrow { form, blocks, groups, .. } = *self.narrow;
        let (row_bytes, stretch) = (self.narrow.row_bytes().max(1), self.narrow.stretch().max(1));
        let Narrow { values, scales, above, .. } = self.narrow;
        let rows = values.chunks_exact_mut(row_bytes).zip(above.chunks_exact_mut(groups));
        for (x, (row, above)) in self.x.iter().zip(rows) {
            if !blocks.is_multiple_of(form.blocks()) {
                row[row_bytes - 4 * BLOCK..].fill(0); // a unit with one block
            }
            let (mut block, group_blocks) = (0, blocks / groups);
            let (mut group, mut left) = (0, group_blocks);
            for x in x.chunks(stretch * BLOCK).flat_map(|x| x.chunks(SEGMENT * BLOCK)) {
                // Magnitudes are ordered as their bits are, NaN above all.
                let largest = x.iter().fold(0, |most, x| most.max(x.abs().to_bits()));
                let largest = f32::from_bits(largest);
                if !largest.is_finite() {
                    return false;
                }
                let (mut scale, mut inverse) = (largest / MOST, MOST / largest);
                if !inverse.is_finite() {
                    (scale, inverse) = (0.0, 0.0); // nothing, or nearly
                }
                if loses(x, largest / FINE, scale) {
                    return false;
                }
                for x in x.as_chunks::<BLOCK>().0 {
                    let (mut values, mut sum) = ([0; BLOCK], 0);
                    for (value, x) in values.iter_mut().zip(x) {
                        // The nearest whole number is in the low bits.
                        *value = (x * inverse + WHOLE).to_bits() as i16;
                        sum += i32::from(*value);
                    }
                    form.write(block, &values, row);
                    above[group] += (form.above() * sum) as f32 * scale;
                    block += 1;
                    left -= 1;
                    if left == 0 {
                        (group, left) = (group + 1, group_blocks);
                    }
                }
                scales.push(scale);
            }
        }
        true
    }
}

/// Values above this part of the largest lose no more than bf16 does.
const FINE: f32 = 128.0;

/// Whether rounding to steps of `scale` moves what lies below `small` by more than bf16's own step,
/// 1/256 of a value, in the mean. Where that is less than an eighth of the values, it may: those
/// above are many, and weigh much more.
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
    let mut half = BLOCK / 2;
    while half > 0 {
        for lane in 0..half {
            squares[lane] += squares[lane + half];
            count[lane] += count[lane + half];
        }
        half /= 2;
    }
    let (square, many) = (squares[0], count[0]);
    many * 8.0 >= x.len() as f32 && many * (scale * scale / 12.0) > square / (256.0 * 256.0)
}
