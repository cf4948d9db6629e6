//! The plan of a layer: which row each slot gets once the slots are sorted by expert.
//!
//! A counting sort: chunks of slots are counted by themselves, a scan over (expert, chunk) gives
//! every chunk its place in every expert's segment, and the chunks write in slot order. So the sort
//! is stable and the same for any number of chunks.

use crate::chunks::{for_each_chunk, shared};
use crate::error::{Error, Result, check_shape};
use crate::threads;
use std::sync::atomic::Ordering::Relaxed;

const OP: &str = "dispatch";

/// Slots that pay for waking another thread.
const CHUNK: usize = 16 << 10;
/// Integers of two cache lines, which processors fetch in pairs.
const CACHE_LINES: usize = 32;

/// Sorts the slots of `ids [T * K]` by expert.
///
/// -1 and `sentinel` mean that a slot chose no expert. Writes `expert_offsets [E + 1]`,
/// `slot_of_row [T * K]` (-1 past the last routed row) and its inverse `row_of_slot [T * K]` (-1
/// where a slot chose no expert).
///
/// # Errors
///
/// An id outside -1..E-1 that is not the sentinel, or more slots than `i32` counts.
///
/// # Examples
///
/// ```
/// # use ferromoe_core::dispatch::dispatch;
/// let (mut offsets, mut slot_of_row, mut row_of_slot) = ([0; 4], [0; 4], [0; 4]);
/// dispatch(&[2, 0, -1, 2], 3, None, &mut offsets, &mut slot_of_row, &mut row_of_slot)?;
/// assert_eq!(offsets, [0, 1, 1, 3]);
/// assert_eq!(slot_of_row, [1, 0, 3, -1]);
/// assert_eq!(row_of_slot, [1, 0, -1, 2]);
/// # Ok::<(), ferromoe_core::Error>(())
/// ```
pub fn dispatch<I: Copy + Into<i64> + Sync>(
    ids: &[I],
    num_experts: usize,
    sentinel: Option<i64>,
    expert_offsets: &mut [i32],
    slot_of_row: &mut [i32],
    row_of_slot: &mut [i32],
) -> Result<()> {
    let slots = ids.len();
    if slots > i32::MAX as usize {
        return Err(Error::Overflow { op: OP, what: "tokens times top_k" });
    }
    check_shape(OP, "expert_offsets", &[expert_offsets.len()], &[num_experts + 1])?;
    check_shape(OP, "slot_of_row", &[slot_of_row.len()], &[slots])?;
    check_shape(OP, "row_of_slot", &[row_of_slot.len()], &[slots])?;
    if let Some(expert) = sentinel.filter(|&id| (0..num_experts as i64).contains(&id)) {
        let expected = format!("lie outside 0..{}", num_experts as i64 - 1);
        return Err(Error::Value { op: OP, arg: "sentinel", expected, got: expert.to_string() });
    }
    let chunks = threads::num_threads().min(slots / CHUNK).max(1);
    let chunk = slots.div_ceil(chunks).max(1);
    // The last bin counts slots without an expert. Two threads' bins lie apart: in one cache line,
    // every count of one would wait for the other's.
    let bins = num_experts + 1 + CACHE_LINES;
    let mut next = vec![0; chunks * bins];
    for_each_chunk(&mut next, bins, 1, |index, counts| {
        let begin = (index * chunk).min(slots);
        count(&ids[begin..(begin + chunk).min(slots)], &mut counts[..=num_experts]);
    });
    if next.chunks(bins).any(|counts| counts[num_experts] > 0) {
        check_ids(ids, num_experts, sentinel)?;
    }

    // From counts to the first row of each (expert, chunk), in that nesting order.
    let mut row = 0;
    for expert in 0..num_experts {
        expert_offsets[expert] = row;
        for counts in next.chunks_mut(bins) {
            row += std::mem::replace(&mut counts[expert], row);
        }
    }
    expert_offsets[num_experts] = row;
    slot_of_row[row as usize..].fill(-1);

    // Every (expert, chunk) has rows of its own, so each entry is stored once.
    let slot_of_row = shared(slot_of_row);
    let mut parts: Vec<_> = row_of_slot.chunks_mut(chunk).zip(next.chunks_mut(bins)).collect();
    for_each_chunk(&mut parts, 1, 1, |index, part| {
        let [(row_of_slot, next)] = part else { unreachable!("chunks of one") };
        let begin = index * chunk;
        let next = &mut next[..num_experts];
        let ids = &ids[begin..][..row_of_slot.len()];
        for (offset, (out, &id)) in row_of_slot.iter_mut().zip(ids).enumerate() {
            let Some(next) = next.get_mut(id.into() as usize) else {
                *out = -1;
                continue;
            };
            let row = *next;
            *next += 1;
            *out = row;
            slot_of_row[row as usize].store((begin + offset) as i32, Relaxed);
        }
    });
    Ok(())
}

/// Counts slots by expert, and those without one in the last bin.
fn count<I: Copy + Into<i64>>(ids: &[I], counts: &mut [i32]) {
    let last = counts.len() - 1;
    for &id in ids {
        // Negative ids are beyond every expert as unsigned numbers.
        counts[(id.into() as usize).min(last)] += 1;
    }
}

/// Fails at the first id that is neither an expert, nor −1, nor the sentinel.
fn check_ids<I: Copy + Into<i64>>(
    ids: &[I],
    num_experts: usize,
    sentinel: Option<i64>,
) -> Result<()> {
    let valid = |id: i64| (-1..num_experts as i64).contains(&id) || Some(id) == sentinel;
    let Some(slot) = ids.iter().position(|&id| !valid(id.into())) else { return Ok(()) };
    let or = sentinel.map_or(String::new(), |sentinel| format!(" or be {sentinel}"));
    let expected = format!("lie in -1..{}{or}", num_experts as i64 - 1);
    let got = format!("{} at slot {slot}", ids[slot].into());
    Err(Error::Value { op: OP, arg: "topk_ids", expected, got })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(ids: &[i64], experts: usize, sentinel: Option<i64>) -> Result<[Vec<i32>; 3]> {
        let mut out = [vec![9; experts + 1], vec![9; ids.len()], vec![9; ids.len()]];
        let [offsets, slot_of_row, row_of_slot] = &mut out;
        dispatch(ids, experts, sentinel, offsets, slot_of_row, row_of_slot)?;
        Ok(out)
    }

    #[test]
    fn many_chunks_sort_as_a_stable_sort_does() {
        const SLOTS: usize = 5 * CHUNK + 77;
        let mut state = 7u32;
        let ids: Vec<i64> = (0..SLOTS)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                i64::from((state >> 16) % 12) - 1
            })
            .collect();
        let mut order: Vec<i32> = (0..SLOTS as i32).filter(|&s| ids[s as usize] >= 0).collect();
        order.sort_by_key(|&slot| ids[slot as usize]); // stable
        let rows = order.len();
        let [offsets, slot_of_row, row_of_slot] = plan(&ids, 11, None).unwrap();
        assert_eq!(offsets[11] as usize, rows);
        assert_eq!(slot_of_row[..rows], order);
        assert!(slot_of_row[rows..].iter().all(|&slot| slot == -1));
        for (slot, &row) in row_of_slot.iter().enumerate() {
            match usize::try_from(row) {
                Ok(row) => assert_eq!(slot_of_row[row] as usize, slot),
                Err(_) => assert_eq!(ids[slot], -1),
            }
        }
    }

    #[test]
    fn no_slots_and_no_experts_are_a_plan_too() {
        assert_eq!(plan(&[], 2, None).unwrap(), [vec![0; 3], vec![], vec![]]);
        assert_eq!(plan(&[-1], 0, None).unwrap(), [vec![0], vec![-1], vec![-1]]);
    }

    #[test]
    fn the_first_invalid_id_is_named() {
        let mut ids = vec![63; 30];
        ids[24] = 64;
        ids[29] = -2;
        assert_eq!(
            plan(&ids, 64, None).unwrap_err().to_string(),
            "dispatch: topk_ids must lie in -1..63, got 64 at slot 24"
        );
        assert_eq!(
            plan(&ids, 64, Some(64)).unwrap_err().to_string(),
            "dispatch: topk_ids must lie in -1..63 or be 64, got -2 at slot 29"
        );
        assert!(plan(&[i64::MIN], 4, None).is_err());
        assert!(plan(&[i64::MAX], 4, None).is_err());
    }

    #[test]
    fn a_sentinel_is_no_expert() {
        assert_eq!(
            plan(&[4, 1, 4, 0], 4, Some(4)).unwrap(),
            [vec![0, 1, 2, 2, 2], vec![3, 1, -1, -1], vec![-1, 1, -1, 0]]
        );
        assert!(plan(&[], 4, Some(3)).is_err());
    }
}
