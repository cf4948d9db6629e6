//! Register tiles: the innermost products, one file per instruction set, chosen at run time.
//!
//! Every product of this crate is made of a few steps on borrowed slices:
//!
//! - many rows: *pack* `cols` columns of the weights into a panel `[k][cols]`, then multiply up to
//!   `rows` rows at a time by the panel, the results in registers;
//! - weights that were packed before are *stored* panels, which any number of rows reads;
//! - few rows: *dot* products straight over weights that lie along k, or *axpy* over weights that
//!   lie along n. Each weight is read once, at the speed of memory.
//!
//! A panel holds the operand type `A`: `f32`, or bf16 pairs where the CPU multiplies those.
//! `T` is what the weights are stored in.
#![allow(unsafe_code, reason = "calls code for CPU features that were detected")]

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
#[cfg(target_arch = "x86_64")]
mod coded;
pub(super) mod codes;
#[cfg(target_arch = "x86_64")]
mod lanes;
pub(super) mod narrow;
mod scalar;
#[cfg(test)]
mod tests;

use super::activation::{Activation, Math};
use super::panels::Format;
use crate::arena::Plain;
use crate::error::Result;
use crate::isa::{self, Isa};
use crate::{Dtype, Element};
use half::{bf16, f16};

/// Rows of x that one `dot` takes.
pub(super) const DOT_ROWS: usize = 6;
/// Rows along k that one `axpy` takes.
pub(super) const AXPY_ROWS: usize = 4;

/// The steps for weights of type `T` and rows of type `A`.
#[allow(clippy::type_complexity, reason = "each is the signature of the method of its name")]
pub struct Tile<T: Element, A: Element<Acc = T::Acc>> {
    /// Rows that a panel is multiplied by at once.
    pub(super) rows: usize,
    /// Columns of a panel.
    pub(super) cols: usize,
    /// Weight rows that one `dot` takes, with up to half of [`DOT_ROWS`].
    streams: usize,
    /// Up to this many rows, `dot` is faster than packing.
    pub(super) few: usize,
    /// Along k, values that stand together in a panel.
    group: usize,
    panel: unsafe fn(&Self, &[&[A]], usize, &[A], usize, &[T], &mut [T::Acc]),
    stored: unsafe fn(&Self, &[&[A]], usize, &[&[T]], &[T], &mut [T::Acc]),
    dot: unsafe fn(&Self, &[&[A]], usize, &[&[T]], bool, &mut [T::Acc]),
    axpy: unsafe fn(&[T::Acc], &[&[T]], &mut [T::Acc]),
    pack_rows: unsafe fn(&Self, &[&[T]], usize, usize, &mut [A]),
    pack_cols: unsafe fn(&Self, &[&[T]], usize, &mut [A]),
    activate: unsafe fn(&Activation, &[T::Acc], &[T::Acc], &mut [A]),
    gradient: unsafe fn(&Activation, &mut [T::Acc], &mut [T::Acc], &[T::Acc], &mut [T::Acc]),
}

// The tables are reached through `Tiled::tiles(isa)` with an `isa` that this CPU has, which is what
// every call below rests on; the lengths are asserted here, once for all instruction sets.
impl<T: Element, A: Element<Acc = T::Acc>> Tile<T, A> {
    /// Weight rows that a `dot` with this many rows of x takes: as many as the registers hold.
    pub(super) fn streams(&self, rows: usize) -> usize {
        if rows > DOT_ROWS / 2 { self.streams / 2 } else { self.streams }
    }

    /// Elements of a panel over `k`.
    pub(super) fn panel_len(&self, k: usize) -> usize {
        self.cols * k.next_multiple_of(self.group)
    }

    /// `out[m][c] = Σ_k rows[m][k] · panel[k][c]` for c < `width`; rows of `out` are `cols` wide.
    ///
    /// Meanwhile `ahead` is brought into the cache, as far as there is time for it.
    pub(super) fn panel(
        &self,
        rows: &[&[A]],
        k: usize,
        panel: &[A],
        width: usize,
        ahead: &[T],
        out: &mut [T::Acc],
    ) {
        assert!((1..=self.rows).contains(&rows.len()) && (1..=self.cols).contains(&width));
        assert!(rows.iter().all(|row| row.len() == k) && panel.len() >= self.panel_len(k));
        assert!(out.len() >= rows.len() * self.cols);
        // SAFETY: the CPU has the features; lengths as asserted.
        unsafe { (self.panel)(self, rows, k, panel, width, ahead, out) }
    }

    /// How stored panels lie.
    pub(super) fn format(&self) -> Format {
        Format { cols: self.cols, group: self.group }
    }

    /// `out[s][m][c] = Σ_k rows[m][k] · panels[s][k][c]`; rows of `out` are `cols` wide.
    ///
    /// Meanwhile `ahead` is brought into the cache if there is one panel.
    pub(super) fn stored(
        &self,
        rows: &[&[A]],
        k: usize,
        panels: &[&[T]],
        ahead: &[T],
        out: &mut [T::Acc],
    ) {
        assert!((1..=self.rows).contains(&rows.len()) && rows.iter().all(|row| row.len() == k));
        assert!((1..=panels_at_once(rows.len())).contains(&panels.len()));
        assert!(panels.iter().all(|panel| panel.len() >= self.panel_len(k)));
        assert!(out.len() >= panels.len() * rows.len() * self.cols);
        // SAFETY: the CPU has the features; lengths as asserted.
        unsafe { (self.stored)(self, rows, k, panels, ahead, out) }
    }

    /// `out[m][s] = x[m] · w[s]`, all of length `k`; rows of `out` are `streams(x.len())` wide.
    ///
    /// With `ahead`, the weights that follow each of `w` in memory are brought into the cache.
    pub(super) fn dot(&self, x: &[&[A]], k: usize, w: &[&[T]], ahead: bool, out: &mut [T::Acc]) {
        let streams = self.streams(x.len());
        assert!((1..=DOT_ROWS).contains(&x.len()) && (1..=streams).contains(&w.len()));
        assert!(x.iter().all(|x| x.len() == k) && w.iter().all(|w| w.len() == k));
        assert!(out.len() >= x.len() * streams);
        // SAFETY: the CPU has the features; lengths as asserted.
        unsafe { (self.dot)(self, x, k, w, ahead, out) }
    }

    /// `out += Σ_j x[j] · w[j]`, j ascending.
    pub(super) fn axpy(&self, x: &[T::Acc], w: &[&[T]], out: &mut [T::Acc]) {
        assert!(x.len() == w.len() && w.len() <= AXPY_ROWS);
        assert!(w.iter().all(|w| w.len() == out.len()));
        // SAFETY: the CPU has the features; lengths as asserted.
        unsafe { (self.axpy)(x, w, out) }
    }

    /// Columns `at..` of a panel from weights that lie along k: one slice per column.
    ///
    /// Columns between the last one and the next multiple of 8 become unspecified.
    pub(super) fn pack_rows(&self, w: &[&[T]], k: usize, at: usize, panel: &mut [A]) {
        assert!(at + w.len() <= self.cols && panel.len() >= self.panel_len(k));
        assert!(w.iter().all(|w| w.len() == k));
        if !w.is_empty() {
            // SAFETY: the CPU has the features; lengths as asserted.
            unsafe { (self.pack_rows)(self, w, k, at, panel) }
        }
    }

    /// Columns `at..` of a panel from weights that lie along n: one slice per k.
    pub(super) fn pack_cols(&self, w: &[&[T]], at: usize, panel: &mut [A]) {
        assert!(panel.len() >= self.panel_len(w.len()));
        let Some(first) = w.first() else { return };
        assert!(at + first.len() <= self.cols && w.iter().all(|w| w.len() == first.len()));
        // SAFETY: the CPU has the features; lengths as asserted.
        unsafe { (self.pack_cols)(self, w, at, panel) }
    }

    /// `out = act(gate) · up`, or `act(gate)` where `up` is empty.
    pub(super) fn activate(
        &self,
        activation: &Activation,
        gate: &[T::Acc],
        up: &[T::Acc],
        out: &mut [A],
    ) {
        // SAFETY: the CPU has the features; the code itself is safe.
        unsafe { (self.activate)(activation, gate, up, out) }
    }

    /// See [`super::activation::gradient`].
    pub(super) fn gradient(
        &self,
        activation: &Activation,
        gate: &mut [T::Acc],
        up: &mut [T::Acc],
        d: &[T::Acc],
        value: &mut [T::Acc],
    ) {
        // SAFETY: the CPU has the features; the code itself is safe.
        unsafe { (self.gradient)(activation, gate, up, d, value) }
    }
}

/// Stored panels that one product of so many rows takes: several where it waits for memory, which
/// is read faster from several places.
pub(super) fn panels_at_once(rows: usize) -> usize {
    match rows {
        0 | 1 => 4,
        2 | 3 => 2,
        _ => 1,
    }
}

/// Asks for the memory of `slice`, which is read soon.
#[inline(always)]
pub(super) fn fetch<T>(slice: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for line in slice.chunks((64 / size_of::<T>()).max(1)) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: SSE is part of x86-64, and a prefetch reads nothing the program sees.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = slice;
}

/// A row operand for weights of type `T`: `T` itself, or `f32` for the 16-bit types.
pub trait Operand<T: Element>: Element<Acc = T::Acc> + Plain {
    /// The same values, where no conversion is needed.
    fn same(x: &[T]) -> Option<&[Self]>;
    /// Converts slices of equal length, exactly.
    fn convert(x: &[T], out: &mut [Self]);
}

impl<T: Element + Plain> Operand<T> for T {
    fn same(x: &[T]) -> Option<&[T]> {
        Some(x)
    }
    fn convert(x: &[T], out: &mut [T]) {
        out.copy_from_slice(x);
    }
}

macro_rules! widened {
    ($type:ty) => {
        impl Operand<$type> for f32 {
            fn same(_: &[$type]) -> Option<&[f32]> {
                None
            }
            fn convert(x: &[$type], out: &mut [f32]) {
                half::slice::HalfFloatSliceExt::convert_to_f32_slice(x, out);
            }
        }
    };
}
widened!(bf16);
widened!(f16);

/// The tile for an element type: rows as they are, or widened to `f32` once per call.
pub enum Choice<T: Element>
where
    T::Acc: Element<Acc = T::Acc>,
{
    /// Rows of x are read where they lie.
    Same(&'static Tile<T, T>),
    /// Rows of x are widened first. The second tile multiplies two operands that both were.
    Wide(&'static Tile<T, T::Acc>, &'static Tile<T::Acc, T::Acc>),
}

/// An element type with tiles.
pub trait Tiled: Element<Acc: Math + Operand<Self> + Element<Acc = Self::Acc>> + Plain {
    /// The tile of an instruction set that this CPU has.
    fn tiles(isa: Isa) -> Choice<Self>;
    /// `out = x` rounded.
    fn round_slice(x: &[Self::Acc], out: &mut [Self]);
    /// The slice as accumulators, where they are the same type.
    fn as_acc(slice: &mut [Self]) -> Option<&mut [Self::Acc]>;
}

macro_rules! tiled {
    ($type:ty, as_acc: |$slice:ident| $as_acc:expr, round: |$x:ident, $out:ident| $round:expr,
     scalar: $scalar:expr, $($isa:ident: $tile:expr,)*) => {
        impl Tiled for $type {
            #[allow(unreachable_patterns, reason = "not every type has a tile of its own everywhere")]
            fn tiles(isa: Isa) -> Choice<Self> {
                match isa {
                    $(#[cfg(target_arch = "x86_64")] Isa::$isa => $tile,)*
                    _ => $scalar,
                }
            }
            fn round_slice($x: &[Self::Acc], $out: &mut [Self]) {
                $round
            }
            fn as_acc($slice: &mut [Self]) -> Option<&mut [Self::Acc]> {
                $as_acc
            }
        }
    };
}
tiled!(f64, as_acc: |x| Some(x), round: |x, out| out.copy_from_slice(x),
    scalar: Choice::Same(&scalar::F64),);
tiled!(f32, as_acc: |x| Some(x), round: |x, out| out.copy_from_slice(x),
    scalar: Choice::Same(&scalar::F32),
    Avx2: Choice::Same(&avx2::F32),
    Avx512: Choice::Same(&avx512::F32),
    Avx512Bf16: Choice::Same(&avx512::F32),);
tiled!(bf16, as_acc: |_x| None,
    round: |x, out| half::slice::HalfFloatSliceExt::convert_from_f32_slice(out, x),
    scalar: Choice::Wide(&scalar::BF16, &scalar::F32),
    Avx2: Choice::Wide(&avx2::BF16, &avx2::F32),
    Avx512: Choice::Wide(&avx512::BF16, &avx512::F32),
    Avx512Bf16: Choice::Same(&avx512_bf16::BF16),);
tiled!(f16, as_acc: |_x| None,
    round: |x, out| half::slice::HalfFloatSliceExt::convert_from_f32_slice(out, x),
    scalar: Choice::Wide(&scalar::F16, &scalar::F32),
    Avx2: Choice::Wide(&avx2::F16, &avx2::F32),
    Avx512: Choice::Wide(&avx512::F16, &avx512::F32),
    Avx512Bf16: Choice::Wide(&avx512::F16, &avx512::F32),);

/// Name of the tile that elements of `dtype` get, for `ferromoe info`.
pub fn name(dtype: Dtype) -> Result<&'static str> {
    let isa = isa::chosen()?;
    Ok(match dtype {
        Dtype::F64 => Isa::Scalar,
        Dtype::BF16 => isa,
        _ => isa.min(Isa::Avx512),
    }
    .name())
}
