//! Agglomerative clustering by complete linkage.

use crate::error::{Error, Result};

/// One merge: the two clusters, called by their smallest members, and their distance.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Merge {
    /// The smaller name, which the union keeps.
    pub first: usize,
    /// The larger name.
    pub second: usize,
    /// Largest distance between a member of one and a member of the other.
    pub height: f64,
}

/// Returns the n − 1 merges in order; the first N − n of them leave n clusters.
///
/// `distances` is symmetric, `[n, n]`; the diagonal is not read. Among equal distances the pair
/// with the smallest names merges first. Cutting by the number of merges, never by a height, is
/// what makes the wanted number of clusters certain.
pub fn complete_linkage(distances: &[Vec<f64>]) -> Result<Vec<Merge>> {
    const OP: &str = "cluster";
    let n = distances.len();
    for (i, row) in distances.iter().enumerate() {
        if row.len() != n {
            let what = format!("row {i} of distances");
            return Err(Error::value(OP, what, format!("have {n} entries"), row.len().to_string()));
        }
        for (j, &distance) in row.iter().enumerate() {
            if i != j && (!distance.is_finite() || distance != distances[j][i]) {
                let what = format!("distance between {i} and {j}");
                return Err(Error::value(
                    OP,
                    what,
                    "be finite and symmetric",
                    distance.to_string(),
                ));
            }
        }
    }
    let mut between = distances.to_vec();
    let mut alive: Vec<_> = (0..n).collect();
    let mut merges = Vec::with_capacity(n.saturating_sub(1));
    while alive.len() > 1 {
        let mut next = Merge { first: 0, second: 0, height: f64::INFINITY };
        for (position, &first) in alive.iter().enumerate() {
            for &second in &alive[position + 1..] {
                if between[first][second] < next.height {
                    next = Merge { first, second, height: between[first][second] };
                }
            }
        }
        alive.retain(|&cluster| cluster != next.second);
        for &other in &alive {
            if other != next.first {
                let farthest = between[next.first][other].max(between[next.second][other]);
                between[next.first][other] = farthest;
                between[other][next.first] = farthest;
            }
        }
        merges.push(next);
    }
    Ok(merges)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn distances(points: &[[f64; 2]]) -> Vec<Vec<f64>> {
        let between = |a: &[f64; 2], b: &[f64; 2]| (a[0] - b[0]).hypot(a[1] - b[1]);
        points.iter().map(|a| points.iter().map(|b| between(a, b)).collect()).collect()
    }

    #[test]
    fn four_router_rows_by_hand() {
        let points = [[0.0, 0.0], [0.0, 1.0], [3.0, 0.0], [3.0, 1.5]];
        let merges = complete_linkage(&distances(&points)).unwrap();
        let pairs: Vec<_> = merges.iter().map(|m| (m.first, m.second)).collect();
        assert_eq!(pairs, [(0, 1), (2, 3), (0, 2)]);
        assert!((merges[2].height - 3.354_102).abs() < 1e-6);
    }

    #[test]
    fn equal_distances_merge_in_order() {
        let merges = complete_linkage(&vec![vec![1.0; 4]; 4]).unwrap();
        let pairs: Vec<_> = merges.iter().map(|m| (m.first, m.second)).collect();
        assert_eq!(pairs, [(0, 1), (0, 2), (0, 3)]);
    }

    #[test]
    fn negative_distances_of_coactivation_by_hand() {
        let (a, b) = (vec![0.0, -3.0, -1.0, 0.0], vec![-3.0, 0.0, -2.0, 0.0]);
        let (c, d) = (vec![-1.0, -2.0, 0.0, 0.0], vec![0.0; 4]);
        let merges = complete_linkage(&[a, b, c, d]).unwrap();
        assert_eq!(merges.iter().map(|m| m.height).collect::<Vec<_>>(), [-3.0, -1.0, 0.0]);
        let pairs: Vec<_> = merges.iter().map(|m| (m.first, m.second)).collect();
        assert_eq!(pairs, [(0, 1), (0, 2), (0, 3)]);
    }

    /// Looks at every pair of clusters, and in them at every pair of members, each time.
    fn by_definition(distances: &[Vec<f64>]) -> Vec<Merge> {
        let mut clusters: Vec<Vec<usize>> = (0..distances.len()).map(|i| vec![i]).collect();
        let mut merges = Vec::new();
        while clusters.len() > 1 {
            let mut best = (f64::INFINITY, 0, 0);
            for a in 0..clusters.len() {
                for b in a + 1..clusters.len() {
                    let pairs =
                        clusters[a].iter().flat_map(|&i| clusters[b].iter().map(move |&j| (i, j)));
                    let apart =
                        pairs.map(|(i, j)| distances[i][j]).fold(f64::NEG_INFINITY, f64::max);
                    if apart < best.0 {
                        best = (apart, a, b);
                    }
                }
            }
            let gone = clusters.remove(best.2);
            merges.push(Merge { first: clusters[best.1][0], second: gone[0], height: best.0 });
            clusters[best.1].extend(gone);
        }
        merges
    }

    #[test]
    fn merges_are_those_of_the_definition_and_heights_never_fall() {
        for n in [0, 1, 2, 9, 30] {
            // Many ties, and none.
            for modulus in [3, 100_003] {
                let number =
                    |i: usize, j: usize| ((i.min(j) * 7919 + i.max(j) * 104_729) % modulus) as f64;
                let distances: Vec<Vec<_>> =
                    (0..n).map(|i| (0..n).map(|j| number(i, j)).collect()).collect();
                let merges = complete_linkage(&distances).unwrap();
                assert_eq!(merges, by_definition(&distances));
                assert!(merges.windows(2).all(|pair| pair[0].height <= pair[1].height));
            }
        }
    }

    #[test]
    fn a_missing_number_is_refused() {
        let error = complete_linkage(&[vec![0.0, f64::NAN], vec![f64::NAN, 0.0]]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "cluster: distance between 0 and 1 must be finite and symmetric, got NaN"
        );
    }
}
