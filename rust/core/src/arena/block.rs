//! Memory of one workspace: from the allocator, or mapped in huge pages when it is large.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

/// A cache line, and the widest vector.
pub(super) const ALIGN: usize = 64;

/// Small blocks come in whole pages, so that sizes which differ little share one.
const PAGE: usize = 4096;

#[cfg(target_os = "linux")]
const HUGE_PAGE: usize = 2 << 20;

/// Owned memory, initialised, aligned to [`ALIGN`].
pub(super) struct Block {
    start: NonNull<u8>,
    bytes: usize,
    mapped: bool,
}

// SAFETY: it owns its memory, as a Vec<u8> does, and shares nothing.
unsafe impl Send for Block {}
// SAFETY: nothing changes through `&Block`.
unsafe impl Sync for Block {}

impl Block {
    /// At least `bytes` bytes of zeros, if there is memory for them; `bytes` is not 0.
    pub(super) fn new(bytes: usize) -> Option<Self> {
        #[cfg(target_os = "linux")]
        if bytes >= HUGE_PAGE {
            return Self::mapped(bytes);
        }
        let layout = Layout::from_size_align(bytes, PAGE).ok()?.pad_to_align();
        let layout = Self::layout(layout.size());
        // SAFETY: the size is not 0, since `bytes` is not.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(Self { start, bytes: layout.size(), mapped: false })
    }

    fn layout(bytes: usize) -> Layout {
        Layout::from_size_align(bytes, ALIGN).expect("the size was checked when allocated")
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn start(&self) -> NonNull<u8> {
        self.start
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        #[cfg(target_os = "linux")]
        if self.mapped {
            // SAFETY: `mapped` mapped exactly these pages for this block, and nobody uses them.
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
            return;
        }
        debug_assert!(!self.mapped);
        // SAFETY: `new` allocated it with the same layout.
        unsafe { dealloc(self.start.as_ptr(), Self::layout(self.bytes)) };
    }
}

#[cfg(target_os = "linux")]
impl Block {
    /// Whole huge pages, as far as the system gives them; zeros until first touched, and then on
    /// the memory node of the thread that touches.
    fn mapped(bytes: usize) -> Option<Self> {
        let size = bytes.checked_next_multiple_of(HUGE_PAGE)?;
        // One huge page more than needed, so that an aligned piece lies inside.
        let room = size.checked_add(HUGE_PAGE)?;
        let (access, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new anonymous mapping at an address of the system's choice touches no other.
        let map = unsafe { libc::mmap(std::ptr::null_mut(), room, access, flags, -1, 0) };
        if map == libc::MAP_FAILED {
            return None;
        }
        let before = map.addr().next_multiple_of(HUGE_PAGE) - map.addr();
        let after = HUGE_PAGE - before;
        // SAFETY: before + size + after == room, so the three pieces are parts of the new mapping;
        // the outer two are given back before anyone knows them. Advice changes no contents.
        unsafe {
            let start = map.byte_add(before);
            if before > 0 {
                libc::munmap(map, before);
            }
            if after > 0 {
                libc::munmap(start.byte_add(size), after);
            }
            libc::madvise(start, size, libc::MADV_HUGEPAGE);
            Some(Self { start: NonNull::new_unchecked(start.cast()), bytes: size, mapped: true })
        }
    }
}

/// Bytes of `blocks` in huge pages, from the process's memory map.
#[cfg(target_os = "linux")]
pub(super) fn huge_page_bytes(blocks: &[Block]) -> usize {
    let map = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    let blocks: Vec<_> = blocks.iter().map(|b| (b.start.addr().get(), b.bytes)).collect();
    huge_bytes_in(&map, &blocks)
}

#[cfg(not(target_os = "linux"))]
pub(super) fn huge_page_bytes(_: &[Block]) -> usize {
    0
}

/// Sums `AnonHugePages` of the mappings in `map` that `blocks`, (address, bytes), lie in.
///
/// The system merges neighbours into one mapping, of which it tells the sum only; a mapping counts
/// for no more than the blocks inside.
#[cfg(target_os = "linux")]
fn huge_bytes_in(map: &str, blocks: &[(usize, usize)]) -> usize {
    let mut inside = 0;
    let mut sum = 0;
    for line in map.lines() {
        if let Some(size) = line.strip_prefix("AnonHugePages:") {
            let kilobytes: usize = size.trim().trim_end_matches(" kB").parse().unwrap_or(0);
            sum += inside.min(kilobytes << 10);
        } else if let Some((begin, end)) = address_range(line) {
            let within = |&&(start, _): &&(usize, usize)| (begin..end).contains(&start);
            inside = blocks.iter().filter(within).map(|&(_, bytes)| bytes).sum();
        }
    }
    sum
}

/// The addresses in the first line of a mapping's entry, `7f3c00000000-7f3c00200000 rw-p …`.
#[cfg(target_os = "linux")]
fn address_range(line: &str) -> Option<(usize, usize)> {
    let (begin, end) = line.split_once(' ')?.0.split_once('-')?;
    Some((usize::from_str_radix(begin, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_large_block_is_whole_aligned_huge_pages_of_zeros() {
        for bytes in [HUGE_PAGE, HUGE_PAGE + 1, 3 * HUGE_PAGE] {
            let block = Block::new(bytes).unwrap();
            assert!(block.mapped);
            assert_eq!(block.bytes(), bytes.next_multiple_of(HUGE_PAGE));
            assert_eq!(block.start().addr().get() % HUGE_PAGE, 0);
            // SAFETY: the block owns these bytes, and they are initialised.
            let slice = unsafe { std::slice::from_raw_parts(block.start().as_ptr(), bytes) };
            assert!(slice.iter().all(|&byte| byte == 0));
        }
        assert!(!Block::new(HUGE_PAGE - PAGE).unwrap().mapped);
    }

    #[test]
    fn huge_pages_are_counted_where_blocks_lie() {
        let map = "7f0000000000-7f0000600000 rw-p 00000000 00:00 0 \n\
                   Size: 6144 kB\n\
                   AnonHugePages:      4096 kB\n\
                   7f0000800000-7f0000a00000 rw-p 00000000 00:00 0 [heap]\n\
                   AnonHugePages:      2048 kB\n";
        let blocks = [(0x7f00_0000_0000, HUGE_PAGE), (0x7f00_0020_0000, 2 * HUGE_PAGE)];
        assert_eq!(huge_bytes_in(map, &blocks), 2 * HUGE_PAGE);
        assert_eq!(huge_bytes_in(map, &blocks[..1]), HUGE_PAGE);
        assert_eq!(huge_bytes_in(map, &[(0x7f00_0080_0000, HUGE_PAGE)]), HUGE_PAGE);
        assert_eq!(huge_bytes_in(map, &[(0x1000, PAGE)]), 0);
    }
}
