//! bf16 with AVX-512's dot product of pairs: twice the rate of `f32`, half the panel.
//!
//! The instruction adds the two products of a pair at once and flushes denormals; both stay far
//! inside what rounding the inputs to bf16 cost. Pairs are neighbours along k.
#![allow(unsafe_code, reason = "functions of CPU features that Isa::detect has seen")]
#![allow(clippy::cast_ptr_alignment, reason = "every access through these is an unaligned one")]
#![allow(
    clippy::wildcard_imports,
    clippy::needless_range_loop,
    reason = "intrinsics by the dozen; loops over registers keep one index for all arrays"
)]

use super::Tile;
use super::avx512::{self, COLS, STREAMS};
use super::lanes::{self, Ahead, Lanes, by_dot_rows, by_panels, by_shape, transpose};
use half::bf16;
use std::arch::x86_64::*;

pub(super) static BF16: Tile<bf16, bf16> = Tile {
    rows: 6,
    cols: COLS,
    streams: STREAMS,
    few: 24,
    group: 2,
    panel,
    stored,
    dot,
    axpy: avx512::axpy::<bf16>,
    pack_rows,
    pack_cols,
    activate: avx512::activate::<bf16>,
    gradient: avx512::gradient,
};

// Each function below is `unsafe` for its CPU features and because it trusts the lengths that the
// method of `Tile` of the same name asserts.

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn panel(
    _: &Tile<bf16, bf16>,
    rows: &[&[bf16]],
    k: usize,
    panel: &[bf16],
    width: usize,
    ahead: &[bf16],
    out: &mut [f32],
) {
    let ahead = Ahead::new(ahead, k / 2);
    let (panel, out) = (panel.as_ptr().cast(), out.as_mut_ptr());
    // SAFETY: lengths as asserted by `Tile::panel`.
    by_shape!(rows.len(), width.div_ceil(16), [1, 2, 3, 4], |M, V| unsafe {
        tile::<M, V, 1>(rows, k, [panel], ahead, out);
    });
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn stored(
    _: &Tile<bf16, bf16>,
    rows: &[&[bf16]],
    k: usize,
    panels: &[&[bf16]],
    ahead: &[bf16],
    out: &mut [f32],
) {
    let ahead = Ahead::new(ahead, k / 2);
    let out = out.as_mut_ptr();
    // SAFETY: lengths as asserted by `Tile::stored`.
    by_panels!(rows.len(), panels.len(), |M, S| unsafe {
        let panels = lanes::starts::<_, S>(panels).map(<*const bf16>::cast::<u32>);
        tile::<M, { COLS / 16 }, S>(rows, k, panels, ahead, out);
    });
}

/// # Safety
///
/// As for [`super::lanes::panels`], with panel lines of `COLS` pairs; an odd k is padded with 0.
#[inline(always)]
unsafe fn tile<const M: usize, const V: usize, const S: usize>(
    rows: &[&[bf16]],
    k: usize,
    panels: [*const u32; S],
    mut ahead: Ahead,
    out: *mut f32,
) {
    // SAFETY: by this function's contract; pairs are read below k, and the last value of an odd
    // row alone.
    unsafe {
        let mut a = [std::ptr::null::<u16>(); M];
        for m in 0..M {
            a[m] = rows.get_unchecked(m).as_ptr().cast();
        }
        let mut sum = [[[_mm512_setzero_ps(); V]; M]; S];
        for pair in 0..k / 2 {
            if S == 1 {
                ahead.step();
            }
            let mut both = [0; M];
            for m in 0..M {
                both[m] = a[m].add(pair * 2).cast::<i32>().read_unaligned();
            }
            for s in 0..S {
                step(&mut sum[s], both, panels[s].add(pair * COLS));
            }
        }
        if k % 2 == 1 {
            let mut alone = [0; M];
            for m in 0..M {
                alone[m] = i32::from(*a[m].add(k - 1));
            }
            for s in 0..S {
                step(&mut sum[s], alone, panels[s].add(k / 2 * COLS));
            }
        }
        for s in 0..S {
            for m in 0..M {
                for v in 0..V {
                    _mm512_storeu_ps(out.add((s * M + m) * COLS + v * 16), sum[s][m][v]);
                }
            }
        }
    }
}

/// Adds the products of one pair per row with a panel line.
///
/// # Safety
///
/// The CPU multiplies bf16 pairs; the line holds `V * 16` pairs.
#[inline(always)]
unsafe fn step<const M: usize, const V: usize>(
    sum: &mut [[__m512; V]; M],
    pairs: [i32; M],
    line: *const u32,
) {
    // SAFETY: by this function's contract.
    unsafe {
        let mut b = [_mm512_setzero_si512(); V];
        for v in 0..V {
            b[v] = _mm512_loadu_si512(line.add(v * 16).cast());
        }
        for m in 0..M {
            let a = _mm512_set1_epi32(pairs[m]);
            for v in 0..V {
                sum[m][v] = dpbf16(sum[m][v], a, b[v]);
            }
        }
    }
}

/// # Safety
///
/// The CPU multiplies bf16 pairs.
#[inline(always)]
unsafe fn dpbf16(sum: __m512, a: __m512i, b: __m512i) -> __m512 {
    // SAFETY: by this function's contract; the vector types are the same 64 bytes.
    unsafe {
        let pairs = std::mem::transmute::<__m512i, __m512bh>;
        _mm512_dpbf16_ps(sum, pairs(a), pairs(b))
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn dot(
    _: &Tile<bf16, bf16>,
    x: &[&[bf16]],
    k: usize,
    w: &[&[bf16]],
    ahead: bool,
    out: &mut [f32],
) {
    // SAFETY: lengths as asserted by `Tile::dot`.
    by_dot_rows!(x.len(), STREAMS, |M, W| unsafe {
        dot_rows::<M, W>(x, k, w, ahead, out.as_mut_ptr());
    });
}

/// # Safety
///
/// As for [`super::lanes::dot`].
#[inline(always)]
unsafe fn dot_rows<const M: usize, const W: usize>(
    x: &[&[bf16]],
    k: usize,
    w: &[&[bf16]],
    ahead: bool,
    out: *mut f32,
) {
    // SAFETY: by this function's contract; whole vectors end at or before k, the mask ends the
    // last one there; a prefetch may name any address.
    unsafe {
        let (mut xs, mut ws) = ([std::ptr::null::<i16>(); M], [std::ptr::null::<i16>(); W]);
        for m in 0..M {
            xs[m] = x.get_unchecked(m).as_ptr().cast();
        }
        for s in 0..W {
            // A short group reads its last row again.
            ws[s] = w.get_unchecked(s.min(w.len() - 1)).as_ptr().cast();
        }
        let mut sum = [[_mm512_setzero_ps(); W]; M];
        let mut at = 0;
        while at + 32 <= k {
            let mut b = [_mm512_setzero_si512(); M];
            for m in 0..M {
                b[m] = _mm512_loadu_si512(xs[m].add(at).cast());
            }
            for s in 0..W {
                let w = _mm512_loadu_si512(ws[s].add(at).cast());
                for m in 0..M {
                    sum[m][s] = dpbf16(sum[m][s], w, b[m]);
                }
                if ahead {
                    _mm_prefetch::<_MM_HINT_T0>(ws[s].wrapping_add(at + k).cast());
                }
            }
            at += 32;
        }
        if at < k {
            let mask = (1u32 << (k - at)) - 1;
            for s in 0..W {
                let w = _mm512_maskz_loadu_epi16(mask, ws[s].add(at));
                for m in 0..M {
                    let b = _mm512_maskz_loadu_epi16(mask, xs[m].add(at));
                    sum[m][s] = dpbf16(sum[m][s], w, b);
                }
            }
        }
        for m in 0..M {
            <__m512 as Lanes>::sums(&sum[m], out.add(m * W));
        }
    }
}

/// Pairs along k are 32-bit values, so a panel of pairs is packed like one of `f32`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn pack_rows(_: &Tile<bf16, bf16>, w: &[&[bf16]], k: usize, at: usize, panel: &mut [bf16]) {
    let panel = panel.as_mut_ptr().cast::<u32>();
    let last = w[w.len() - 1];
    for (block, eight) in w.chunks(8).enumerate() {
        let mut rows = [last.as_ptr(); 8];
        for (row, w) in rows.iter_mut().zip(eight) {
            *row = w.as_ptr();
        }
        // SAFETY: lengths as asserted by `Tile::pack_rows`; `at` and blocks are multiples of 8
        // columns, so a block's 8 columns end at or before COLS.
        unsafe {
            let panel = panel.add(at + block * 8);
            let mut pair = 0;
            while (pair + 8) * 2 <= k {
                let mut v = [_mm256_setzero_ps(); 8];
                for i in 0..8 {
                    v[i] = _mm256_loadu_ps(rows[i].add(pair * 2).cast());
                }
                transpose(&mut v);
                for i in 0..8 {
                    _mm256_storeu_ps(panel.add((pair + i) * COLS).cast(), v[i]);
                }
                pair += 8;
            }
            for pair in pair..k.div_ceil(2) {
                for i in 0..8 {
                    let p = rows[i].add(pair * 2);
                    let high = if pair * 2 + 1 < k { (*p.add(1)).to_bits() } else { 0 };
                    let both = u32::from((*p).to_bits()) | u32::from(high) << 16;
                    panel.add(pair * COLS + i).write_unaligned(both);
                }
            }
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")]
unsafe fn pack_cols(_: &Tile<bf16, bf16>, w: &[&[bf16]], at: usize, panel: &mut [bf16]) {
    let panel = panel.as_mut_ptr().cast::<u32>();
    for (pair, rows) in w.chunks(2).enumerate() {
        let n = rows[0].len();
        // SAFETY: lengths as asserted by `Tile::pack_cols`; the mask ends the last vector of a row
        // at its end.
        unsafe {
            let line = panel.add(pair * COLS + at);
            let mut c = 0;
            while c < n {
                let mask = u16::MAX >> (16 - (n - c).min(16));
                let load = |row: &[bf16]| {
                    _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(
                        mask,
                        row.as_ptr().add(c).cast(),
                    ))
                };
                let low = load(rows[0]);
                let high = rows.get(1).map_or(_mm512_setzero_si512(), |row| load(row));
                let both = _mm512_or_si512(low, _mm512_slli_epi32::<16>(high));
                _mm512_mask_storeu_epi32(line.add(c).cast(), mask, both);
                c += 16;
            }
        }
    }
}
