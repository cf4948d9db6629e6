//! Memory of kernels, kept between calls: workspaces, and large results.
//!
//! Every fresh block of some size costs page faults, which at 2 to 3 GB/s may cost more than the
//! kernel that asks for it. So blocks go back to a list of the process and are handed out again;
//! a workspace that proves too small is replaced, so that the list grows to what the largest call
//! needs. Large blocks lie in huge pages where the system gives them.
#![allow(unsafe_code, reason = "hands out raw memory as typed slices")]

use crate::threads::PerProcess;
use half::{bf16, f16};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Mutex, MutexGuard, PoisonError};

mod block;
mod result;

use block::{ALIGN, Block};
pub use result::ResultMemory;

/// Bytes that the list keeps at most; what comes back beyond it goes to the system.
const MAX_KEPT: usize = 512 << 20;

/// A number type of workspaces: any bytes are a value of it.
///
/// # Safety
///
/// Every bit pattern is a valid value, and the alignment is at most 64 bytes.
pub unsafe trait Plain: Copy + Send + Sync + 'static {}

macro_rules! plain {
    ($($type:ty)*) => {
        $(
            // SAFETY: a number without padding or forbidden values, aligned to its size.
            unsafe impl Plain for $type {}
        )*
    };
}
plain!(u8 i8 u16 i16 u32 i32 u64 i64 usize f16 bf16 f32 f64);

/// A workspace: a slice that goes back to the arena when dropped. Made by [`take`].
pub struct Scratch<T: Plain> {
    /// None for no elements.
    block: Option<Block>,
    len: usize,
    elements: PhantomData<T>,
}

/// Hands out a workspace of `len` elements, aligned to 64 bytes, whose values are whatever was left
/// there.
///
/// # Panics
///
/// If there is no memory for it.
///
/// # Examples
///
/// ```
/// let mut sums = ferromoe_core::arena::take::<f32>(1000);
/// sums.fill(0.0);
/// assert_eq!(sums.len(), 1000);
/// ```
pub fn take<T: Plain>(len: usize) -> Scratch<T> {
    let bytes = len.checked_mul(size_of::<T>()).expect("a workspace fits in memory");
    let block = (bytes > 0).then(|| kept().take(bytes)).map(|found| match found {
        Found::Fits(block) => block,
        // The outgrown block goes first, so that both need not fit at once.
        Found::Outgrown(block) => {
            drop(block);
            Block::new(bytes)
                .unwrap_or_else(|| panic!("out of memory for a workspace of {bytes} bytes"))
        }
    });
    Scratch { block, len, elements: PhantomData }
}

/// Gives the kept blocks back to the system; returns their bytes. Workspaces in use stay.
pub fn release_memory() -> usize {
    let blocks = std::mem::take(&mut kept().blocks);
    blocks.iter().map(Block::bytes).sum()
}

/// Bytes that are kept for the next calls.
pub fn kept_bytes() -> usize {
    kept().bytes()
}

/// Bytes of the kept blocks that lie in huge pages, as far as the system tells.
pub fn huge_page_bytes() -> usize {
    let kept = kept();
    block::huge_page_bytes(&kept.blocks)
}

impl<T: Plain> Deref for Scratch<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the block has at least `len` elements' bytes, initialised when it was made and
        // aligned for any Plain; any bytes are values, and the block is this workspace's alone.
        unsafe { std::slice::from_raw_parts(self.start().as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for Scratch<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start().as_ptr(), self.len) }
    }
}

impl<T: Plain> Scratch<T> {
    fn start(&self) -> NonNull<T> {
        self.block.as_ref().map_or(NonNull::dangling(), |block| block.start().cast())
    }
}

impl<T: Plain> Drop for Scratch<T> {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            // Dropped after the lock, since unmapping takes its time.
            let _evicted = kept().give_back(block, MAX_KEPT);
        }
    }
}

const _: () = assert!(ALIGN == 64, "the promise of `take` and of `Plain`");

/// Blocks waiting for work, the one that came back last at the end.
#[derive(Default)]
struct Kept {
    blocks: Vec<Block>,
}

enum Found {
    Fits(Block),
    /// Nothing fits; the largest block makes room for its successor, if there is one.
    Outgrown(Option<Block>),
}

fn kept() -> MutexGuard<'static, Kept> {
    static KEPT: PerProcess<Mutex<Kept>> = PerProcess::new();
    // No code that can panic runs under the lock while the list is half changed.
    KEPT.get().lock().unwrap_or_else(PoisonError::into_inner)
}

impl Kept {
    fn bytes(&self) -> usize {
        self.blocks.iter().map(Block::bytes).sum()
    }

    /// The smallest block that fits.
    fn take(&mut self, bytes: usize) -> Found {
        let sized = || self.blocks.iter().enumerate().map(|(i, block)| (block.bytes(), i));
        if let Some((_, i)) = sized().filter(|&(size, _)| size >= bytes).min() {
            return Found::Fits(self.blocks.remove(i));
        }
        Found::Outgrown(sized().max().map(|(_, i)| self.blocks.remove(i)))
    }

    /// The smallest block that fits and is not much larger, for memory that stays out for long.
    fn take_close(&mut self, bytes: usize) -> Option<Block> {
        let sized = self.blocks.iter().enumerate().map(|(i, block)| (block.bytes(), i));
        let (_, i) = sized.filter(|&(size, _)| size >= bytes && size - bytes <= size / 4).min()?;
        Some(self.blocks.remove(i))
    }

    /// Keeps `block`; returns the blocks that no longer fit under `max` bytes, oldest first.
    fn give_back(&mut self, block: Block, max: usize) -> Vec<Block> {
        if block.bytes() > max {
            return vec![block];
        }
        self.blocks.push(block);
        let mut over = self.bytes().saturating_sub(max);
        let mut evicted = 0;
        while over > 0 {
            over = over.saturating_sub(self.blocks[evicted].bytes());
            evicted += 1;
        }
        self.blocks.drain(..evicted).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(kept: &Kept) -> Vec<usize> {
        kept.blocks.iter().map(|block| block.bytes() >> 12).collect()
    }

    /// A list with blocks of so many 4 KiB pages.
    fn list(pages: &[usize]) -> Kept {
        Kept { blocks: pages.iter().map(|&n| Block::new(n << 12).unwrap()).collect() }
    }

    #[test]
    fn workspaces_are_aligned_and_hold_what_is_written() {
        for len in [0, 1, 63, 4096, 700_001] {
            let mut floats = take::<f32>(len);
            let mut ids = take::<i64>(len);
            assert_eq!((floats.len(), ids.len()), (len, len));
            assert_eq!(floats.as_ptr().addr() % if len == 0 { 4 } else { 64 }, 0);
            floats.fill(1.5);
            ids.fill(-1);
            assert!(floats.iter().all(|&x| x.to_bits() == 1.5f32.to_bits()));
            assert!(ids.iter().all(|&id| id == -1));
        }
    }

    #[test]
    fn threads_take_and_give_back_at_once() {
        std::thread::scope(|scope| {
            for thread in 0..4u32 {
                scope.spawn(move || {
                    for round in 0..50 {
                        let mut scratch = take::<u32>((thread * 1000 + round * 77) as usize);
                        scratch.fill(thread);
                        std::thread::yield_now();
                        assert!(scratch.iter().all(|&value| value == thread));
                    }
                });
            }
        });
    }

    #[test]
    fn the_smallest_block_that_fits_is_taken() {
        let mut kept = list(&[9, 3, 5]);
        let Found::Fits(block) = kept.take(4 << 12) else { panic!("5 pages fit") };
        assert_eq!((block.bytes(), sizes(&kept)), (5 << 12, vec![9, 3]));
    }

    #[test]
    fn a_result_takes_no_block_that_is_much_too_large() {
        let mut kept = list(&[9, 5, 4]);
        assert!(kept.take_close(3 << 12).is_some_and(|block| block.bytes() == 4 << 12));
        assert!(kept.take_close(3 << 12).is_none());
        assert_eq!(sizes(&kept), [9, 5]);
    }

    #[test]
    fn the_largest_block_is_replaced_when_none_fits() {
        let mut kept = list(&[2, 3, 1]);
        let Found::Outgrown(Some(block)) = kept.take(4 << 12) else { panic!("none fits") };
        assert_eq!((block.bytes(), sizes(&kept)), (3 << 12, vec![2, 1]));
        assert!(matches!(list(&[]).take(1), Found::Outgrown(None)));
    }

    #[test]
    fn the_oldest_blocks_make_room() {
        let mut kept = list(&[4, 1, 2]);
        assert!(kept.give_back(Block::new(3 << 12).unwrap(), 10 << 12).is_empty());
        let evicted = kept.give_back(Block::new(5 << 12).unwrap(), 10 << 12);
        assert_eq!((evicted.len(), sizes(&kept)), (2, vec![2, 3, 5]));
        let evicted = kept.give_back(Block::new(11 << 12).unwrap(), 10 << 12);
        assert_eq!((evicted.len(), sizes(&kept)), (1, vec![2, 3, 5]));
    }

    #[test]
    #[should_panic(expected = "out of memory")]
    fn no_memory_is_a_panic_that_the_caller_can_report() {
        take::<u8>(isize::MAX as usize - (64 << 20));
    }
}
