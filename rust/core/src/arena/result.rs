//! Memory of one new array.

use super::block::{ALIGN, Block};
use super::{MAX_KEPT, kept};
use std::alloc::{Layout, alloc, dealloc};
use std::hint::black_box;
use std::ptr::{NonNull, null_mut};

/// From so many bytes on, memory comes from the kept blocks and goes back to them. Below, the
/// allocator gives back warm memory itself, and whole huge pages would be too coarse.
const LARGE: usize = 8 << 20;

/// Owned memory for the result of an operation, aligned to 64 bytes, contents undefined.
pub struct ResultMemory(Kind);

enum Kind {
    Empty,
    /// With room to align the start: allocators are quicker without an alignment of ours.
    Small(NonNull<u8>, Layout),
    /// None only while it is dropped.
    Large(Option<Block>),
}

// SAFETY: it owns its memory, as a Vec<u8> does, and shares nothing.
unsafe impl Send for ResultMemory {}

impl ResultMemory {
    /// Memory of `bytes` bytes, if there is any.
    ///
    /// # Examples
    ///
    /// ```
    /// # use ferromoe_core::arena::ResultMemory;
    /// assert_eq!(ResultMemory::new(100).unwrap().start().addr() % 64, 0);
    /// assert!(ResultMemory::new(0).unwrap().start().is_null());
    /// assert!(ResultMemory::new(isize::MAX as usize).is_none());
    /// ```
    pub fn new(bytes: usize) -> Option<Self> {
        if bytes == 0 {
            return Some(Self(Kind::Empty));
        }
        if bytes >= LARGE {
            let block = kept().take_close(bytes);
            return Some(Self(Kind::Large(Some(block.or_else(|| Block::new(bytes))?))));
        }
        let layout = Layout::from_size_align(bytes + ALIGN, 1).ok()?;
        // SAFETY: the size is not 0.
        let start = NonNull::new(unsafe { alloc(layout) })?;
        // Numbers, whatever they are, to the code that gets to see them: as in memory that
        // another library hands out, of which the compiler knows nothing either.
        Some(Self(Kind::Small(black_box(start), layout)))
    }

    /// The first byte; null for no bytes.
    pub fn start(&self) -> *mut u8 {
        match &self.0 {
            Kind::Empty | Kind::Large(None) => null_mut(),
            Kind::Small(start, _) => {
                let start = start.as_ptr();
                // Less than ALIGN further, which is inside.
                start.wrapping_add(start.align_offset(ALIGN))
            }
            Kind::Large(Some(block)) => block.start().as_ptr(),
        }
    }
}

impl Drop for ResultMemory {
    fn drop(&mut self) {
        match &mut self.0 {
            Kind::Empty => {}
            // SAFETY: `new` allocated it with this layout.
            Kind::Small(start, layout) => unsafe { dealloc(start.as_ptr(), *layout) },
            Kind::Large(block) => {
                // Dropped after the lock, since unmapping takes its time.
                let _evicted = block.take().map(|block| kept().give_back(block, MAX_KEPT));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_result_comes_back_as_the_next_one() {
        let bytes = 3 * LARGE + 4096;
        let first = ResultMemory::new(bytes).unwrap();
        let start = first.start();
        drop(first);
        // Other tests share the list, but none asks for a block of this size.
        assert_eq!(ResultMemory::new(bytes - 4096).unwrap().start(), start);
    }
}
