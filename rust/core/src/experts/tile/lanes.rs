//! The steps of [`super::Tile`] over a vector type, compiled once for each instruction set.
//!
//! Everything here is `inline(always)`: it ends up inside a function of `avx2.rs`, `avx512.rs` or
//! `avx512_bf16.rs` that enables the features, which is where these bodies become vector code.
#![allow(unsafe_code, reason = "vector loads and stores; see each contract")]
#![allow(
    clippy::wildcard_imports,
    clippy::needless_range_loop,
    reason = "intrinsics by the dozen; loops over registers keep one index for all arrays"
)]

use super::DOT_ROWS;
use crate::Element;
use half::{bf16, f16};
use std::arch::x86_64::*;

/// A register of `f32`. All functions need the CPU features of the implementation.
pub(super) trait Lanes: Copy {
    const N: usize;
    unsafe fn zero() -> Self;
    unsafe fn splat(x: f32) -> Self;
    /// `self * a + b`, rounded once.
    unsafe fn mul_add(self, a: Self, b: Self) -> Self;
    /// Writes the sum of the lanes of each of `W` registers.
    unsafe fn sums<const W: usize>(registers: &[Self; W], out: *mut f32);
    /// Reads `N` values.
    unsafe fn load(p: *const f32) -> Self;
    /// Writes `N` values.
    unsafe fn store(self, p: *mut f32);
}

/// Loading values of type `T` as `f32`.
pub(super) trait Widen<T>: Lanes {
    /// Reads `N` values.
    unsafe fn widen(p: *const T) -> Self;
    /// Reads `n < N` values; the other lanes are zero.
    unsafe fn widen_part(p: *const T, n: usize) -> Self;
}

impl Lanes for __m256 {
    const N: usize = 8;
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller's features.
        unsafe { _mm256_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller's features.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, a: Self, b: Self) -> Self {
        // SAFETY: the caller's features.
        unsafe { _mm256_fmadd_ps(self, a, b) }
    }
    #[inline(always)]
    unsafe fn sums<const W: usize>(registers: &[Self; W], out: *mut f32) {
        const { assert!(W.is_multiple_of(2), "registers in pairs") };
        // SAFETY: the caller's features; W values are writable, and a pair is half of four.
        unsafe {
            let pair = |i: usize| _mm256_hadd_ps(registers[i], registers[i + 1]);
            for i in (0..W).step_by(4) {
                let alone = i + 2 == W;
                let four = _mm256_hadd_ps(pair(i), pair(if alone { i } else { i + 2 }));
                let high = _mm256_extractf128_ps::<1>(four);
                let sums = _mm_add_ps(_mm256_castps256_ps128(four), high);
                if alone {
                    _mm_storel_epi64(out.add(i).cast(), _mm_castps_si128(sums));
                } else {
                    _mm_storeu_ps(out.add(i), sums);
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller's features; 8 values are readable.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller's features; 8 values are writable.
        unsafe { _mm256_storeu_ps(p, self) }
    }
}

macro_rules! widen_256 {
    ($type:ty, |$p:ident| $load:expr) => {
        impl Widen<$type> for __m256 {
            #[inline(always)]
            unsafe fn widen($p: *const $type) -> Self {
                // SAFETY: the caller's features; 8 values are readable.
                unsafe { $load }
            }
            #[inline(always)]
            unsafe fn widen_part(p: *const $type, n: usize) -> Self {
                // AVX2 has no masked load of 16 bits: through a buffer, at most once per row.
                let mut part = [<$type>::default(); 8];
                // SAFETY: n < 8 values are readable; the buffer holds 8.
                unsafe {
                    std::ptr::copy_nonoverlapping(p, part.as_mut_ptr(), n);
                    Self::widen(part.as_ptr())
                }
            }
        }
    };
}
widen_256!(f32, |p| _mm256_loadu_ps(p));
widen_256!(bf16, |p| {
    let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
});
widen_256!(f16, |p| _mm256_cvtph_ps(_mm_loadu_si128(p.cast())));

/// Memory that a panel product brings into the core's own cache while it computes.
#[derive(Clone, Copy)]
pub(super) struct Ahead {
    next: *const u8,
    /// Bytes per step; two cache lines are asked for in each.
    stride: usize,
}

impl Ahead {
    /// As much of `memory` as `steps` steps of two lines reach.
    #[inline(always)]
    pub(super) fn new<T>(memory: &[T], steps: usize) -> Self {
        let stride = size_of_val(memory).div_ceil(steps.max(1)).min(128);
        Self { next: memory.as_ptr().cast(), stride }
    }

    /// # Safety
    ///
    /// None beyond SSE, which is part of x86-64: a prefetch may name any address.
    #[inline(always)]
    pub(super) unsafe fn step(&mut self) {
        // SAFETY: as above.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(self.next.cast());
            _mm_prefetch::<_MM_HINT_T1>(self.next.wrapping_add(64).cast());
        }
        self.next = self.next.wrapping_add(self.stride);
    }
}

/// `out[s][m][c] = Σ_k rows[m][k] · panels[s][k][c]` for `M` rows, `V * N` columns and `S` panels.
///
/// Every sum goes along k in order, whatever the other numbers are.
///
/// # Safety
///
/// The CPU has the features of `L`; `M` rows of `k` values; in each panel `k` lines of `cols`
/// values, and `S * M` lines of `out` of `cols` values, `cols >= V * N`.
#[inline(always)]
pub(super) unsafe fn panels<L: Widen<T>, T, const M: usize, const V: usize, const S: usize>(
    rows: &[&[f32]],
    k: usize,
    panels: [*const T; S],
    cols: usize,
    mut ahead: Ahead,
    out: *mut f32,
) {
    // SAFETY: by this function's contract; every access is at an index below k, M, S or V * N.
    unsafe {
        let mut a = [std::ptr::null(); M];
        for m in 0..M {
            a[m] = rows.get_unchecked(m).as_ptr();
        }
        let mut sum = [[[L::zero(); V]; M]; S];
        for kk in 0..k {
            if S == 1 {
                ahead.step();
            }
            for s in 0..S {
                let line = panels[s].add(kk * cols);
                let mut b = [L::zero(); V];
                for v in 0..V {
                    b[v] = L::widen(line.add(v * L::N));
                }
                for m in 0..M {
                    let a = L::splat(*a[m].add(kk));
                    for v in 0..V {
                        sum[s][m][v] = a.mul_add(b[v], sum[s][m][v]);
                    }
                }
            }
        }
        for s in 0..S {
            for m in 0..M {
                for v in 0..V {
                    sum[s][m][v].store(out.add((s * M + m) * cols + v * L::N));
                }
            }
        }
    }
}

/// `out[m][s] = x[m] · w[s]` for `M` rows of x and `W` of w; lines of `out` hold `W` values.
///
/// With `ahead`, the memory behind each row of w is brought closer: the next row of its stream.
///
/// # Safety
///
/// The CPU has the features of `L`; all rows have `k` values, `out` has `M * W`.
#[inline(always)]
pub(super) unsafe fn dot<L: Widen<T> + Widen<f32>, T, const M: usize, const W: usize>(
    x: &[&[f32]],
    k: usize,
    w: &[&[T]],
    ahead: bool,
    out: *mut f32,
) {
    // SAFETY: by this function's contract; vectors are read at offsets up to k - N, the rest
    // as a part. A prefetch may name any address.
    unsafe {
        let (mut xs, mut ws) = ([std::ptr::null(); M], [std::ptr::null(); W]);
        for m in 0..M {
            xs[m] = x.get_unchecked(m).as_ptr();
        }
        for s in 0..W {
            // A short group reads its last row again.
            ws[s] = w.get_unchecked(s.min(w.len() - 1)).as_ptr();
        }
        let mut sum = [[L::zero(); W]; M];
        let mut at = 0;
        while at + L::N <= k {
            let mut b = [L::zero(); M];
            for m in 0..M {
                b[m] = <L as Widen<f32>>::widen(xs[m].add(at));
            }
            for s in 0..W {
                let w = L::widen(ws[s].add(at));
                for m in 0..M {
                    sum[m][s] = w.mul_add(b[m], sum[m][s]);
                }
                if ahead {
                    _mm_prefetch::<_MM_HINT_T0>(ws[s].wrapping_add(at + k).cast());
                }
            }
            at += L::N;
        }
        if at < k {
            for s in 0..W {
                let w = L::widen_part(ws[s].add(at), k - at);
                for m in 0..M {
                    let b = <L as Widen<f32>>::widen_part(xs[m].add(at), k - at);
                    sum[m][s] = w.mul_add(b, sum[m][s]);
                }
            }
        }
        for m in 0..M {
            L::sums(&sum[m], out.add(m * W));
        }
    }
}

/// `out += Σ_j x[j] · w[j]`, j ascending.
///
/// # Safety
///
/// The CPU has the features of `L`; all rows of `w` are as long as `out`.
#[inline(always)]
pub(super) unsafe fn axpy<L: Widen<T>, T: Element<Acc = f32>>(
    x: &[f32],
    w: &[&[T]],
    out: &mut [f32],
) {
    let (n, p) = (out.len(), out.as_mut_ptr());
    // SAFETY: by this function's contract; vectors end at or before n.
    unsafe {
        let mut at = 0;
        if let (&[x0, x1, x2, x3], &[w0, w1, w2, w3]) = (x, w) {
            let (x0, x1, x2, x3) = (L::splat(x0), L::splat(x1), L::splat(x2), L::splat(x3));
            while at + L::N <= n {
                let mut sum = L::load(p.add(at));
                sum = x0.mul_add(L::widen(w0.as_ptr().add(at)), sum);
                sum = x1.mul_add(L::widen(w1.as_ptr().add(at)), sum);
                sum = x2.mul_add(L::widen(w2.as_ptr().add(at)), sum);
                sum = x3.mul_add(L::widen(w3.as_ptr().add(at)), sum);
                sum.store(p.add(at));
                at += L::N;
            }
        } else {
            while at + L::N <= n {
                let mut sum = L::load(p.add(at));
                for (&x, w) in x.iter().zip(w) {
                    sum = L::splat(x).mul_add(L::widen(w.as_ptr().add(at)), sum);
                }
                sum.store(p.add(at));
                at += L::N;
            }
        }
        for at in at..n {
            for (&x, w) in x.iter().zip(w) {
                let out = &mut *p.add(at);
                // Rounded once, as the vectors are: where a row is cut must not show.
                *out = x.mul_add(w.get_unchecked(at).widen(), *out);
            }
        }
    }
}

/// Columns `at..` of a panel `[k][cols]` of `f32` from rows along k, 8 by 8.
///
/// # Safety
///
/// The CPU has AVX2 and F16C; `w` is not empty, its rows have `k` values; the panel has `k * cols`;
/// `at + w.len() <= cols` and both `at` and `cols` are multiples of 8.
#[inline(always)]
pub(super) unsafe fn pack_rows<T: Element<Acc = f32>>(
    w: &[&[T]],
    k: usize,
    at: usize,
    panel: *mut f32,
    cols: usize,
) where
    __m256: Widen<T>,
{
    let last = w[w.len() - 1];
    for (block, eight) in w.chunks(8).enumerate() {
        let mut rows = [last.as_ptr(); 8];
        for (row, w) in rows.iter_mut().zip(eight) {
            *row = w.as_ptr();
        }
        // SAFETY: by this function's contract; a block starts at a multiple of 8 below cols, so
        // its 8 columns end at or before cols.
        unsafe {
            let panel = panel.add(at + block * 8);
            let mut kk = 0;
            while kk + 8 <= k {
                let mut v = [_mm256_setzero_ps(); 8];
                for i in 0..8 {
                    v[i] = __m256::widen(rows[i].add(kk));
                }
                transpose(&mut v);
                for i in 0..8 {
                    v[i].store(panel.add((kk + i) * cols));
                }
                kk += 8;
            }
            for kk in kk..k {
                for i in 0..8 {
                    *panel.add(kk * cols + i) = (*rows[i].add(kk)).widen();
                }
            }
        }
    }
}

/// Columns `at..` of a panel `[k][cols]` of `f32` from rows along n.
///
/// # Safety
///
/// The CPU has the features of `L`; the rows are equally long; the panel has `w.len() * cols`;
/// `at` plus a row's length is at most `cols`.
#[inline(always)]
pub(super) unsafe fn pack_cols<L: Widen<T>, T: Element<Acc = f32>>(
    w: &[&[T]],
    at: usize,
    panel: *mut f32,
    cols: usize,
) {
    for (kk, row) in w.iter().enumerate() {
        // SAFETY: by this function's contract; vectors end at or before the row's end.
        unsafe {
            let line = panel.add(kk * cols + at);
            let mut c = 0;
            while c + L::N <= row.len() {
                L::widen(row.as_ptr().add(c)).store(line.add(c));
                c += L::N;
            }
            for c in c..row.len() {
                *line.add(c) = row.get_unchecked(c).widen();
            }
        }
    }
}

/// Transposes 8 registers of 8.
///
/// # Safety
///
/// The CPU has AVX.
#[inline(always)]
pub(super) unsafe fn transpose(v: &mut [__m256; 8]) {
    // SAFETY: by this function's contract.
    unsafe {
        let mut t = [_mm256_setzero_ps(); 8];
        for i in 0..4 {
            t[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
            t[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
        }
        let mut u = [_mm256_setzero_ps(); 8];
        for i in 0..2 {
            u[4 * i] = _mm256_shuffle_ps::<0x44>(t[4 * i], t[4 * i + 2]);
            u[4 * i + 1] = _mm256_shuffle_ps::<0xee>(t[4 * i], t[4 * i + 2]);
            u[4 * i + 2] = _mm256_shuffle_ps::<0x44>(t[4 * i + 1], t[4 * i + 3]);
            u[4 * i + 3] = _mm256_shuffle_ps::<0xee>(t[4 * i + 1], t[4 * i + 3]);
        }
        for i in 0..4 {
            v[i] = _mm256_permute2f128_ps::<0x20>(u[i], u[i + 4]);
            v[i + 4] = _mm256_permute2f128_ps::<0x31>(u[i], u[i + 4]);
        }
    }
}

/// Calls `$f::<…, M, V>` for the number of rows and of registers across.
macro_rules! by_shape {
    ($rows:expr, $width:expr, [$($v:literal),+], |$m:ident, $n:ident| $call:expr) => {
        by_shape!(@rows $rows, $width, [$($v),+], |$m, $n| $call; 1 2 3 4 5 6)
    };
    (@rows $rows:expr, $width:expr, $vs:tt, |$m:ident, $n:ident| $call:expr; $($r:literal)+) => {
        match $rows {
            $($r => { const $m: usize = $r; by_shape!(@width $width, $vs, $n, $call) })+
            _ => unreachable!("a tile has at most 6 rows"),
        }
    };
    (@width $width:expr, [$($v:literal),+], $n:ident, $call:expr) => {
        match $width {
            $($v => { const $n: usize = $v; $call })+
            _ => unreachable!("a panel is at most `cols` wide"),
        }
    };
}
pub(super) use by_shape;

/// Calls `$call` with `M` the number of rows and `S` that of the panels they are multiplied by.
macro_rules! by_panels {
    ($rows:expr, $panels:expr, |$m:ident, $s:ident| $call:expr) => {
        by_panels!(@ ($rows, $panels), |$m, $s| $call;
            1 1, 1 2, 1 3, 1 4, 2 1, 2 2, 3 1, 3 2, 4 1, 5 1, 6 1)
    };
    (@ $shape:expr, |$m:ident, $s:ident| $call:expr; $($r:literal $p:literal),+) => {
        match $shape {
            $(($r, $p) => {
                const $m: usize = $r;
                const $s: usize = $p;
                $call
            })+
            _ => unreachable!("more panels than `panels_at_once` says"),
        }
    };
}
pub(super) use by_panels;

/// Where each of `S` panels begins.
#[inline(always)]
pub(super) fn starts<T, const S: usize>(panels: &[&[T]]) -> [*const T; S] {
    std::array::from_fn(|s| panels[s].as_ptr())
}

/// Calls `$call` with `M` the number of rows of a dot, and `W` the weight rows it takes then.
macro_rules! by_dot_rows {
    ($rows:expr, $streams:expr, |$m:ident, $w:ident| $call:expr) => {
        by_dot_rows!(@ $rows, |$m, $w| $call;
            1 $streams, 2 $streams, 3 $streams,
            4 $streams / 2, 5 $streams / 2, 6 $streams / 2)
    };
    (@ $rows:expr, |$m:ident, $w:ident| $call:expr; $($r:literal $streams:expr),+) => {
        match $rows {
            $($r => {
                const $m: usize = $r;
                const $w: usize = $streams;
                $call
            })+
            _ => unreachable!("a dot has at most DOT_ROWS rows"),
        }
    };
}
pub(super) use by_dot_rows;

const _: () = assert!(DOT_ROWS == 6, "by_dot_rows lists the row counts");
