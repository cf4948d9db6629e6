//! Plans whose experts' segments are padded to whole blocks: rows that exist but carry nothing.

use crate::error::{Error, Result, check_shape};
use crate::permute::Maps;

/// Offsets of the experts' segments once each is padded to a multiple of `align` rows.
///
/// An expert without rows gets none, or one block of `align` with `min_block`.
///
/// # Errors
///
/// An `align` of 0, offsets that decrease, or more rows than `i32` counts.
pub fn padded_offsets(
    expert_offsets: &[i32],
    align: usize,
    min_block: bool,
    padded: &mut [i32],
) -> Result<()> {
    lay_out("padded_offsets", expert_offsets, align, min_block, padded)
}

fn lay_out(
    op: &'static str,
    expert_offsets: &[i32],
    align: usize,
    min_block: bool,
    padded: &mut [i32],
) -> Result<()> {
    check_shape(op, "out", &[padded.len()], &[expert_offsets.len()])?;
    if align == 0 {
        let (expected, got) = ("be at least 1".into(), "0".into());
        return Err(Error::Value { op, arg: "align", expected, got });
    }
    let Some((first, padded)) = padded.split_first_mut() else { return Ok(()) };
    *first = 0;
    let mut end = 0usize;
    for (padded, pair) in padded.iter_mut().zip(expert_offsets.windows(2)) {
        let Ok(count) = usize::try_from(i64::from(pair[1]) - i64::from(pair[0])) else {
            let (expected, got) = ("not decrease".into(), format!("{} after {}", pair[1], pair[0]));
            return Err(Error::Value { op, arg: "expert_offsets", expected, got });
        };
        let rows = if min_block { count.max(1) } else { count };
        end = rows.div_ceil(align).saturating_mul(align).saturating_add(end);
        *padded = i32::try_from(end).map_err(|_| Error::Overflow { op, what: "padded rows" })?;
    }
    Ok(())
}

/// Pads the experts' segments of a plan to multiples of `align` rows.
///
/// From `expert_offsets [E + 1]` and the maps of the plan, writes the same of the padded one. Rows
/// of padding, and those past the last segment, have slot -1.
///
/// # Errors
///
/// As of [`padded_offsets`]; offsets or maps that point outside, or a `padded_slot_of_row` that is
/// too short.
pub fn pad_plan(
    expert_offsets: &[i32],
    maps: Maps<'_>,
    align: usize,
    min_block: bool,
    padded_offsets: &mut [i32],
    padded_slot_of_row: &mut [i32],
    padded_row_of_slot: &mut [i32],
) -> Result<()> {
    const OP: &str = "pad_plan";
    lay_out(OP, expert_offsets, align, min_block, padded_offsets)?;
    let (&[first, ..], &[.., last]) = (expert_offsets, expert_offsets) else {
        let expected = "[E + 1]".into();
        return Err(Error::Shape { op: OP, arg: "expert_offsets", expected, got: vec![0] });
    };
    let Maps { slot_of_row, row_of_slot, .. } = maps;
    if first != 0 || last as usize > slot_of_row.len() {
        let expected = format!("lie in 0..{}, from 0 on", slot_of_row.len());
        let got = format!("{first} to {last}");
        return Err(Error::Value { op: OP, arg: "expert_offsets", expected, got });
    }
    maps.check(OP)?;
    check_shape(OP, "out", &[padded_row_of_slot.len()], &[row_of_slot.len()])?;
    let needed = padded_offsets[padded_offsets.len() - 1];
    if padded_slot_of_row.len() < needed as usize {
        let (expected, got) =
            (format!("be at least {needed}"), padded_slot_of_row.len().to_string());
        return Err(Error::Value { op: OP, arg: "num_rows", expected, got });
    }
    padded_slot_of_row.fill(-1);
    padded_row_of_slot.fill(-1);
    for (pair, &start) in expert_offsets.windows(2).zip(padded_offsets.iter()) {
        let segment = &slot_of_row[pair[0] as usize..pair[1] as usize];
        padded_slot_of_row[start as usize..][..segment.len()].copy_from_slice(segment);
        for (row, &slot) in (start..).zip(segment) {
            if let Ok(slot) = usize::try_from(slot) {
                padded_row_of_slot[slot] = row;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_rounds_every_expert_up() {
        let mut padded = [9; 4];
        padded_offsets(&[0, 5, 5, 13], 8, false, &mut padded).unwrap();
        assert_eq!(padded, [0, 8, 8, 16]);
        padded_offsets(&[0, 5, 5, 13], 8, true, &mut padded).unwrap();
        assert_eq!(padded, [0, 8, 16, 24]);
        assert!(padded_offsets(&[0, 5, 5, 13], 0, true, &mut padded).is_err());
        assert!(padded_offsets(&[0, 5, 4, 13], 8, true, &mut padded).is_err());
    }

    #[test]
    fn rows_move_with_their_segment() {
        let (mut offsets, mut slots, mut rows) = ([9; 4], [9; 9], [9; 4]);
        let mut pad = |expert_offsets: &[i32], slot_of_row: &[i32]| {
            let maps = Maps { slot_of_row, row_of_slot: &[1, 0, 2, -1], tokens: 2, top_k: 2 };
            pad_plan(expert_offsets, maps, 4, false, &mut offsets, &mut slots, &mut rows)
        };
        pad(&[0, 1, 1, 3], &[1, 0, 2, -1]).unwrap();
        assert!(pad(&[1, 1, 1, 3], &[1, 0, 2, -1]).is_err());
        assert!(pad(&[0, 1, 1, 5], &[1, 0, 2, -1]).is_err());
        assert!(pad(&[0, 1, 1, 3], &[1, 0, 4, -1]).is_err());
        let error = pad(&[0, 1, 2, 3], &[1, 0, 2, -1]).unwrap_err();
        assert_eq!(error.to_string(), "pad_plan: num_rows must be at least 12, got 9");
        pad(&[0, 1, 1, 3], &[1, 0, 2, -1]).unwrap();
        assert_eq!(offsets, [0, 4, 4, 8]);
        assert_eq!(slots, [1, -1, -1, -1, 0, 2, -1, -1, -1]);
        assert_eq!(rows, [4, 0, 5, -1]);
    }
}
