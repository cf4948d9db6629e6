//! Where rows go when consecutive chunks of them are put into another order.

use crate::error::{Error, Result, check_shape};

const OP: &str = "sort_chunks";

/// Maps of the rows once the chunks of `split_sizes [C]` rows are put in `order [C]`.
///
/// Row `r` of the result is row `source_of_row[r]`, and `row_of_source` is the inverse. Rows past
/// the last chunk stay where they are.
///
/// # Errors
///
/// Sizes that are negative or add up to more rows than there are, or an order that does not name
/// each chunk once.
///
/// # Examples
///
/// ```
/// # use ferromoe_core::sort_chunks::chunk_maps;
/// let (mut source_of_row, mut row_of_source) = ([0; 4], [0; 4]);
/// chunk_maps(&[1, 2], &[1, 0], &mut source_of_row, &mut row_of_source)?;
/// assert_eq!(source_of_row, [1, 2, 0, 3]);
/// assert_eq!(row_of_source, [2, 0, 1, 3]);
/// # Ok::<(), ferromoe_core::Error>(())
/// ```
pub fn chunk_maps(
    split_sizes: &[i64],
    order: &[i64],
    source_of_row: &mut [i32],
    row_of_source: &mut [i32],
) -> Result<()> {
    let (chunks, rows) = (split_sizes.len(), source_of_row.len());
    check_shape(OP, "order", &[order.len()], &[chunks])?;
    check_shape(OP, "row_of_source", &[row_of_source.len()], &[rows])?;
    if rows > i32::MAX as usize {
        return Err(Error::Overflow { op: OP, what: "rows" });
    }
    let mut sources = Vec::with_capacity(chunks);
    let mut end = 0;
    for (at, &size) in split_sizes.iter().enumerate() {
        let start = end;
        end = usize::try_from(size)
            .map_err(|_| value("split_sizes", "not be negative".into(), size, at))?
            .saturating_add(start);
        if end > rows {
            return Err(value("split_sizes", format!("add up to at most {rows} rows"), end, at));
        }
        sources.push(Some(start..end));
    }
    let mut row = 0;
    for (at, &chunk) in order.iter().enumerate() {
        let source = usize::try_from(chunk).ok().and_then(|chunk| sources.get_mut(chunk)?.take());
        let Some(source) = source else {
            let expected = format!("name each of the {chunks} chunks once");
            return Err(value("order", expected, chunk, at));
        };
        for source in source {
            source_of_row[row] = source as i32;
            row_of_source[source] = row as i32;
            row += 1;
        }
    }
    for row in end..rows {
        source_of_row[row] = row as i32;
        row_of_source[row] = row as i32;
    }
    Ok(())
}

fn value(arg: &'static str, expected: String, got: impl std::fmt::Display, at: usize) -> Error {
    Error::Value { op: OP, arg, expected, got: format!("{got} at index {at}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(split_sizes: &[i64], order: &[i64], rows: usize) -> Result<Vec<i32>> {
        let (mut forth, mut back) = (vec![9; rows], vec![9; rows]);
        chunk_maps(split_sizes, order, &mut forth, &mut back)?;
        for (row, &source) in forth.iter().enumerate() {
            assert_eq!(back[source as usize] as usize, row);
        }
        Ok(forth)
    }

    #[test]
    fn chunks_change_places_and_the_rest_stays() {
        assert_eq!(sources(&[2, 0, 1], &[2, 1, 0], 5).unwrap(), [2, 0, 1, 3, 4]);
        assert_eq!(sources(&[], &[], 2).unwrap(), [0, 1]);
        assert_eq!(sources(&[0], &[0], 0).unwrap(), []);
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for (split_sizes, order, message) in [
            ([1, -1], [0, 1], "split_sizes must not be negative, got -1 at index 1"),
            ([1, 4], [0, 1], "split_sizes must add up to at most 4 rows, got 5 at index 1"),
            ([i64::MAX; 2], [0, 1], "split_sizes must add up to at most 4 rows, got"),
            ([1, 2], [0, 2], "order must name each of the 2 chunks once, got 2 at index 1"),
            ([1, 2], [0, 0], "order must name each of the 2 chunks once, got 0 at index 1"),
            ([1, 2], [-1, 0], "order must name each of the 2 chunks once, got -1 at index 0"),
        ] {
            let error = sources(&split_sizes, &order, 4).unwrap_err().to_string();
            assert!(error.starts_with(&format!("sort_chunks: {message}")), "{error}");
        }
        assert!(sources(&[1, 2], &[0], 4).is_err());
    }
}
