//! Agglomerative clustering.

use crate::error::{Error, Result};

const OP: &str = "cluster";

/// How far apart two clusters are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Linkage {
    /// As far as their farthest members.
    Complete,
    /// The mean over all pairs of members (UPGMA).
    Average,
    /// As far as their nearest members.
    Single,
}

impl Linkage {
    /// By its name among the options.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "complete" => Ok(Self::Complete),
            "average" => Ok(Self::Average),
            "single" => Ok(Self::Single),
            _ => {
                let got = format!("{name:?}");
                Err(Error::value(OP, "linkage", "be complete, average or single", got))
            }
        }
    }
}

/// Two clusters that became one. A cluster is called by its smallest member, so the union is called
/// `into`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Merge {
    /// The smaller of the two names.
    pub into: usize,
    /// The larger.
    pub from: usize,
    /// Their distance.
    pub height: f64,
}

/// All n − 1 merges of n items, in order; heights do not fall.
///
/// Among equal distances the lexicographically smallest pair is merged first. Take n − c merges for
/// c clusters: a cut by height would not know where to stop among equal heights.
///
/// # Examples
///
/// ```
/// # use ferromoe_compress::cluster::{Linkage, cluster};
/// let distances = [0.0, 1.0, 4.0, 1.0, 0.0, 2.0, 4.0, 2.0, 0.0];
/// let merges = cluster(&distances, 3, Linkage::Complete)?;
/// assert_eq!((merges[0].into, merges[0].from, merges[0].height), (0, 1, 1.0));
/// assert_eq!((merges[1].into, merges[1].from, merges[1].height), (0, 2, 4.0));
/// # Ok::<(), ferromoe_compress::Error>(())
/// ```
pub fn cluster(distances: &[f64], n: usize, linkage: Linkage) -> Result<Vec<Merge>> {
    if distances.len() != n * n {
        let got = format!("{} numbers for {n} items", distances.len());
        return Err(Error::value(OP, "distances", "be a square matrix", got));
    }
    for i in 0..n {
        for j in i + 1..n {
            let (there, back) = (distances[i * n + j], distances[j * n + i]);
            if !there.is_finite() || there != back {
                let got = format!("{there} at [{i}, {j}] and {back} at [{j}, {i}]");
                return Err(Error::value(OP, "distances", "be finite and symmetric", got));
            }
        }
    }
    let mut clusters = Clusters { d: distances.to_vec(), n, members: vec![1; n], linkage };
    let mut nearest: Vec<_> = (0..n).map(|i| clusters.nearest(i)).collect();
    let mut merges = Vec::with_capacity(n.saturating_sub(1));
    while merges.len() + 1 < n {
        let mut best: Option<Merge> = None;
        for (into, &found) in nearest.iter().enumerate() {
            if let Some((height, from)) = found.filter(|_| clusters.members[into] > 0)
                && best.is_none_or(|best| height < best.height)
            {
                best = Some(Merge { into, from, height });
            }
        }
        let merge = best.expect("two clusters are alive");
        clusters.merge(merge);
        for (i, nearest) in nearest.iter_mut().enumerate() {
            let stale = |(_, j): (f64, usize)| j == merge.into || j == merge.from;
            if i == merge.into || nearest.is_some_and(stale) {
                *nearest = clusters.nearest(i);
            } else if i < merge.into {
                let distance = clusters.d[i * n + merge.into];
                let nearer = |(old, j)| distance < old || (distance == old && merge.into < j);
                if nearest.is_some_and(nearer) {
                    *nearest = Some((distance, merge.into));
                }
            }
        }
        merges.push(merge);
    }
    Ok(merges)
}

struct Clusters {
    d: Vec<f64>,
    n: usize,
    /// How many items each cluster has; 0 once it is part of another.
    members: Vec<u32>,
    linkage: Linkage,
}

impl Clusters {
    /// The nearest cluster with a larger name, the smallest among equals.
    fn nearest(&self, i: usize) -> Option<(f64, usize)> {
        let mut best: Option<(f64, usize)> = None;
        for j in (i + 1..self.n).filter(|&j| self.members[j] > 0) {
            let distance = self.d[i * self.n + j];
            if best.is_none_or(|best| distance < best.0) {
                best = Some((distance, j));
            }
        }
        best
    }

    fn merge(&mut self, Merge { into, from, .. }: Merge) {
        let (a, b) = (f64::from(self.members[into]), f64::from(self.members[from]));
        for k in 0..self.n {
            let (x, y) = (self.d[into * self.n + k], self.d[from * self.n + k]);
            let distance = match self.linkage {
                Linkage::Complete => x.max(y),
                Linkage::Average => (a * x + b * y) / (a + b),
                Linkage::Single => x.min(y),
            };
            self.d[into * self.n + k] = distance;
            self.d[k * self.n + into] = distance;
        }
        self.members[into] += self.members[from];
        self.members[from] = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;

    fn euclidean(points: &[[f64; 2]]) -> Vec<f64> {
        let pairs = points.iter().flat_map(|a| points.iter().map(move |b| (a, b)));
        pairs.map(|(a, b)| (a[0] - b[0]).hypot(a[1] - b[1])).collect()
    }

    fn heights(merges: &[Merge]) -> Vec<f64> {
        merges.iter().map(|merge| (merge.height * 1e6).round() / 1e6).collect()
    }

    #[test]
    fn router_rows_cluster_as_worked_out_by_hand() {
        let d = euclidean(&[[0.0, 0.0], [0.0, 1.0], [3.0, 0.0], [3.0, 1.5]]);
        let merges = cluster(&d, 4, Linkage::Complete).unwrap();
        assert_eq!(heights(&merges), [1.0, 1.5, 3.354_102]);
        assert_eq!([merges[0].into, merges[0].from, merges[1].into, merges[1].from], [0, 1, 2, 3]);
        let d = euclidean(&[[0.0, 0.0], [0.0, 0.2], [5.0, 0.0], [9.0, 0.0]]);
        assert_eq!(heights(&cluster(&d, 4, Linkage::Complete).unwrap()), [0.2, 4.0, 9.002_222]);
    }

    #[test]
    fn negative_distances_and_ties_follow_the_smallest_pair() {
        #[rustfmt::skip]
        let coactivation = [
            0.0, -3.0, -1.0, 0.0,
            -3.0, 0.0, -2.0, 0.0,
            -1.0, -2.0, 0.0, 0.0,
            0.0, 0.0, 0.0, 0.0,
        ];
        let merges = cluster(&coactivation, 4, Linkage::Complete).unwrap();
        assert_eq!(heights(&merges), [-3.0, -1.0, 0.0]);
        let names: Vec<_> = merges.iter().map(|merge| (merge.into, merge.from)).collect();
        assert_eq!(names, [(0, 1), (0, 2), (0, 3)]);
        let all_equal = cluster(&[1.0; 25], 5, Linkage::Complete).unwrap();
        let names: Vec<_> = all_equal.iter().map(|merge| (merge.into, merge.from)).collect();
        assert_eq!(names, [(0, 1), (0, 2), (0, 3), (0, 4)]);
    }

    /// Looks at every pair of clusters, and in them at every pair of members, each time.
    fn by_definition(d: &[f64], n: usize, linkage: Linkage) -> Vec<Merge> {
        let mut clusters: Vec<Vec<usize>> = (0..n).map(|i| vec![i]).collect();
        let mut merges = Vec::new();
        while clusters.len() > 1 {
            let mut best = (f64::INFINITY, 0, 0);
            for a in 0..clusters.len() {
                for b in a + 1..clusters.len() {
                    let pairs =
                        clusters[a].iter().flat_map(|i| clusters[b].iter().map(move |j| i * n + j));
                    let apart: Vec<_> = pairs.map(|at| d[at]).collect();
                    let distance = match linkage {
                        Linkage::Complete => apart.iter().copied().fold(f64::MIN, f64::max),
                        Linkage::Average => apart.iter().sum::<f64>() / apart.len() as f64,
                        Linkage::Single => apart.iter().copied().fold(f64::MAX, f64::min),
                    };
                    if distance < best.0 {
                        best = (distance, a, b);
                    }
                }
            }
            let gone = clusters.remove(best.2);
            merges.push(Merge { into: clusters[best.1][0], from: gone[0], height: best.0 });
            clusters[best.1].extend(gone);
        }
        merges
    }

    #[test]
    fn merges_are_those_of_the_definition() {
        let mut random = Random::new(4);
        for n in [0, 1, 2, 9, 24] {
            for distinct in [3, 1000] {
                let mut d = vec![0.0; n * n];
                for i in 0..n {
                    for j in 0..i {
                        d[i * n + j] = random.below(distinct) as f64;
                        d[j * n + i] = d[i * n + j];
                    }
                }
                for linkage in [Linkage::Complete, Linkage::Single] {
                    let merges = cluster(&d, n, linkage).unwrap();
                    assert_eq!(merges, by_definition(&d, n, linkage));
                    assert!(merges.windows(2).all(|pair| pair[0].height <= pair[1].height));
                }
                // Means round, so that ties of the definition are none here, and the reverse.
                if distinct == 1000 {
                    let merges = cluster(&d, n, Linkage::Average).unwrap();
                    for (ours, theirs) in merges.iter().zip(by_definition(&d, n, Linkage::Average))
                    {
                        assert_eq!((ours.into, ours.from), (theirs.into, theirs.from));
                        assert!((ours.height - theirs.height).abs() < 1e-9);
                    }
                }
            }
        }
    }

    #[test]
    fn linkages_differ_as_worked_out_by_hand() {
        let outputs = [0.0, 1.0, 4.0, 6.0, 6.5];
        let d = euclidean(&outputs.map(|x| [x, 0.0]));
        let of = |linkage| heights(&cluster(&d, 5, linkage).unwrap());
        assert_eq!(of(Linkage::Average), [0.5, 1.0, 2.25, 5.0]);
        assert_eq!(of(Linkage::Complete), [0.5, 1.0, 2.5, 6.5]);
        assert_eq!(of(Linkage::Single), [0.5, 1.0, 2.0, 3.0]);
    }

    #[test]
    fn a_lopsided_matrix_is_refused_with_the_place() {
        let error = cluster(&[0.0, 1.0, 2.0, 0.0], 2, Linkage::Complete).unwrap_err().to_string();
        let got = "got 1 at [0, 1] and 2 at [1, 0]";
        assert_eq!(error, format!("cluster: distances must be finite and symmetric, {got}"));
    }
}
