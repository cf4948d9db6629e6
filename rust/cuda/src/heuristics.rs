//! Grids and tiles as pure functions of shapes, so that they are tested without a GPU.

use crate::launch::Grid;

/// The widest load and store of a GPU.
pub(crate) const VECTOR_BYTES: u64 = 16;

/// The largest power of two, at most [`VECTOR_BYTES`], that divides every one of `values`: row
/// lengths in bytes and addresses, of rows to be moved in units of that many bytes.
pub(crate) fn unit_bytes(values: &[u64]) -> u64 {
    let bits = values.iter().fold(VECTOR_BYTES, |bits, value| bits | value);
    1 << bits.trailing_zeros()
}

/// Threads of a block that walks a row of `units` loads.
///
/// A function of the row alone: sums over a row are taken in an order that depends on the number of
/// threads, and must not change with the number of rows.
pub(crate) fn row_threads(units: u64) -> u32 {
    units.clamp(1, 256).next_multiple_of(32) as u32
}

/// One block per row, or several where so few rows would leave multiprocessors idle.
pub(crate) fn row_grid(rows: u32, units: u64, multiprocessors: i32) -> Grid {
    /// Resident blocks of 256 threads that hide the latency of memory.
    const BLOCKS_PER_MULTIPROCESSOR: u64 = 4;
    /// The hardware's limit on the second axis of a grid.
    const LAST: u64 = 65_535;
    let threads = row_threads(units);
    let wanted = BLOCKS_PER_MULTIPROCESSOR * multiprocessors.max(1) as u64;
    let useful = units.div_ceil(u64::from(threads)).max(1);
    let split = wanted.div_ceil(u64::from(rows.max(1))).min(useful).min(LAST);
    Grid { blocks: [rows, split as u32], threads }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_divides_row_length_and_addresses() {
        assert_eq!(unit_bytes(&[4096, 0x7f00_0000, 0x7f00_0200]), 16);
        assert_eq!(unit_bytes(&[8190, 0x7f00_0000, 0x7f00_0200]), 2);
        assert_eq!(unit_bytes(&[4096, 0x7f00_0008, 0x7f00_0204]), 4);
        assert_eq!(unit_bytes(&[3, 64, 64]), 1);
    }

    #[test]
    fn threads_are_whole_warps_and_depend_on_the_row_alone() {
        assert_eq!([1, 32, 33, 256, 9000].map(row_threads), [32, 32, 64, 256, 256]);
    }

    #[test]
    fn one_row_is_spread_over_blocks_and_many_rows_are_not() {
        let grid = |rows, units| row_grid(rows, units, 132).blocks;
        assert_eq!(grid(1, 896), [1, 4]);
        assert_eq!(grid(4096, 896), [4096, 1]);
        assert_eq!(grid(300, 896), [300, 2]);
        assert_eq!(grid(1, 1), [1, 1]);
    }

    #[test]
    fn no_grid_passes_the_limit_of_its_second_axis() {
        assert!(row_grid(1, u64::MAX, i32::MAX).blocks[1] <= 65_535);
    }
}
