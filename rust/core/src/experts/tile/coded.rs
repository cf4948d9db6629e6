//! Few rows of x times all rows of codes of a run: the loop around the products.
#![allow(unsafe_code, reason = "pointers to rows of codes that were counted")]
#![allow(clippy::needless_range_loop, reason = "one index for all arrays of registers")]

use crate::experts::codes::Codes;

/// Products of `M` rows of x, which `self` knows, with `W` rows of codes.
pub(super) trait Products<const M: usize, const W: usize> {
    /// `out[m][s] = x[m] · codes[s]`, of rows with so many `groups`.
    ///
    /// # Safety
    ///
    /// The CPU has the features of the implementation; rows of codes and of scales are as long as
    /// those of x need them; `out` holds `M * W`.
    unsafe fn products(
        &self,
        codes: [*const u8; W],
        scales: [*const f32; W],
        groups: usize,
        out: *mut f32,
    );
}

/// `out[m * stride + n] = x[m] · codes[n]`.
///
/// Each of `W` streams walks through a stretch of neighbouring rows, so memory sees a few
/// sequential readers.
///
/// # Safety
///
/// As of [`Products`], and `out` holds `M` lines.
#[inline(always)]
pub(super) unsafe fn walk<P: Products<M, W>, const M: usize, const W: usize>(
    x: &P,
    codes: &Codes<'_>,
    out: *mut f32,
    stride: usize,
) {
    let (count, bytes, groups) = (codes.len(), codes.row_bytes(), codes.groups());
    let stretch = count.div_ceil(W);
    for step in 0..stretch {
        // A short call reads its first row again.
        let mut rows = [step; W];
        for s in 1..W {
            if step + s * stretch < count {
                rows[s] = step + s * stretch;
            }
        }
        let mut products = [[0.0; W]; M];
        // SAFETY: by this function's contract; rows lie below `count`.
        unsafe {
            let (mut starts, mut scales) = ([codes.bytes.as_ptr(); W], [codes.scales.as_ptr(); W]);
            for s in 0..W {
                starts[s] = starts[s].add(rows[s] * bytes);
                scales[s] = scales[s].add(rows[s] * groups);
            }
            x.products(starts, scales, groups, products.as_mut_ptr().cast());
            for m in 0..M {
                // The first row's last, since others may stand for it.
                for s in (0..W).rev() {
                    *out.add(m * stride + rows[s]) = products[m][s];
                }
            }
        }
    }
}
