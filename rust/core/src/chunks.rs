//! Writing one slice from several threads: in chunks that have one writer each, or anywhere.
#![allow(unsafe_code, reason = "hands disjoint parts of one slice to different threads")]

use crate::threads;
use std::sync::atomic::AtomicI32;

/// Calls `f(i, chunk i)` for the consecutive chunks of `len` elements of `out`.
///
/// `grain` chunks pay for waking a thread; up to that many everything runs inline. The last chunk
/// may be shorter. With `len` 0 there are no chunks.
pub fn for_each_chunk<T: Send>(
    out: &mut [T],
    len: usize,
    grain: usize,
    f: impl Fn(usize, &mut [T]) + Sync,
) {
    if len == 0 {
        return;
    }
    let (total, grain) = (out.len(), grain.max(1));
    let start = SharedStart(out.as_mut_ptr());
    let chunks = total.div_ceil(len);
    // A batch of `grain` chunks at a time: claiming work costs more than a small chunk does.
    threads::for_each(chunks.div_ceil(grain), 1, |batch| {
        for i in batch * grain..((batch + 1) * grain).min(chunks) {
            let begin = i * len;
            let end = (begin + len).min(total);
            // SAFETY: begin..end lies inside `out`, which outlives the call, and for_each hands
            // each batch, so each chunk, to one caller of `f` only.
            let chunk =
                unsafe { std::slice::from_raw_parts_mut(start.get().add(begin), end - begin) };
            f(i, chunk);
        }
    });
}

/// The same integers for threads that scatter into them; a relaxed store costs what any other does.
pub fn shared(out: &mut [i32]) -> &[AtomicI32] {
    let out: *mut [i32] = out;
    // SAFETY: an AtomicI32 has the size, alignment and values of an i32 (its documentation), and
    // the exclusive borrow, which lasts as long as the result, rules out accesses by other means.
    unsafe { &*(out as *const [AtomicI32]) }
}

struct SharedStart<T>(*mut T);

impl<T> SharedStart<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

// SAFETY: only `for_each_chunk` uses it, and gives each thread elements of its own; T is Send.
unsafe impl<T: Send> Sync for SharedStart<T> {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_belongs_to_one_chunk() {
        for (total, len, grain) in [(0, 3, 1), (10, 3, 1), (9, 3, 2), (5, 8, 1), (7, 1, 100)] {
            let mut out = vec![0; total];
            for_each_chunk(&mut out, len, grain, |i, chunk| {
                for value in chunk {
                    *value += i + 1;
                }
            });
            let expected: Vec<_> = (0..total).map(|at| at / len + 1).collect();
            assert_eq!(out, expected);
        }
    }

    #[test]
    fn chunks_of_nothing_are_none() {
        for_each_chunk(&mut [1, 2], 0, 1, |_, _| panic!("there is no chunk"));
    }
}
