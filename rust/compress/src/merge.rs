//! Weighted means of experts, and of slices such as router rows, in the layout they are stored in.

use crate::align::{Alignment, Neurons, align};
use crate::checkpoint::{Source, Tensor};
use crate::error::{Error, Result};
use crate::recipe::{Align, Group, Layer, Packing};
use ferromoe_core::Element;
use ferromoe_core::dtype::Accumulator;
use half::{bf16, f16};
use std::collections::HashMap;

const OP: &str = "rewrite";

/// An element type that can be averaged, as it lies in a file.
trait Stored: Element {
    fn from_bytes(bytes: &[u8]) -> Self;
    fn to_bytes(self, into: &mut [u8]);
}
macro_rules! stored {
    ($($type:ty),*) => {
        $(impl Stored for $type {
            fn from_bytes(bytes: &[u8]) -> Self {
                Self::from_le_bytes(bytes.try_into().expect("chunks of this type's size"))
            }
            fn to_bytes(self, into: &mut [u8]) {
                into.copy_from_slice(&self.to_le_bytes());
            }
        })*
    };
}
stored!(f32, f64, bf16, f16);

/// Runs `$body` with `$T` as the tensor's element type; other types cannot be averaged.
macro_rules! with_stored {
    ($tensor:expr, $T:ident, $body:expr) => {
        match $tensor.dtype.name() {
            "F32" => {
                type $T = f32;
                $body
            }
            "BF16" => {
                type $T = bf16;
                $body
            }
            "F16" => {
                type $T = f16;
                $body
            }
            "F64" => {
                type $T = f64;
                $body
            }
            other => Err(Error::Unsupported {
                op: OP,
                what: format!(
                    "{} is {other}, and only floating-point weights can be averaged; prune instead \
                     of merging, or convert the checkpoint first",
                    $tensor.name
                ),
            }),
        }
    };
}

/// One expert's part: a matrix (or a bias as a column) inside a tensor.
struct Slice<'a> {
    tensor: &'a Tensor,
    offset: u64,
    bytes: usize,
    rows: usize,
    columns: usize,
}

/// The merged experts of a source, with the alignments found so far.
pub struct Merger<'a> {
    source: &'a Source,
    layers: &'a [Layer],
    alignments: HashMap<(usize, usize), Vec<Option<Alignment>>>,
}

impl<'a> Merger<'a> {
    /// Nothing is read yet.
    pub fn new(source: &'a Source, layers: &'a [Layer]) -> Self {
        Self { source, layers, alignments: HashMap::new() }
    }

    /// Dtype, and shape of one expert, of a part.
    pub fn part(&self, layer: usize, part: &str) -> Result<(&'a Tensor, Vec<usize>, bool)> {
        let layer = &self.layers[layer];
        let name = &layer.tensors[part];
        let per_expert = name.contains("{e}");
        let first = layer.groups.first().map_or(0, |group| group.members[0]);
        let tensor = self.source.tensor(&name.replace("{e}", &first.to_string()))?;
        let shape = if per_expert { &tensor.shape[..] } else { &tensor.shape[1..] };
        if shape.is_empty() || shape.len() > 2 {
            let what = format!("shape of {}", tensor.name);
            let got = format!("{:?}", tensor.shape);
            return Err(Error::value(OP, what, "be that of expert matrices or biases", got));
        }
        with_stored!(tensor, T, Ok((size_of::<T>(), ())))?;
        Ok((tensor, shape.to_vec(), per_expert))
    }

    fn slice(&self, layer: &Layer, part: &str, expert: usize) -> Result<Slice<'a>> {
        let name = &layer.tensors[part];
        let tensor = self.source.tensor(&name.replace("{e}", &expert.to_string()))?;
        let (shape, number) = if name.contains("{e}") {
            (&tensor.shape[..], 0)
        } else {
            let experts = tensor.shape.first().copied().unwrap_or(0);
            if expert >= experts {
                let what = format!("members of {}", layer.name);
                return Err(Error::value(
                    OP,
                    what,
                    format!("be below {experts}"),
                    expert.to_string(),
                ));
            }
            (&tensor.shape[1..], expert)
        };
        let (rows, columns) = (shape[0], shape.get(1).copied().unwrap_or(1));
        let bytes = rows * columns * (tensor.dtype.bits() as usize / 8);
        Ok(Slice { tensor, offset: (number * bytes) as u64, bytes, rows, columns })
    }

    fn read(&self, slice: &Slice<'_>) -> Result<Vec<u8>> {
        let mut bytes = vec![0; slice.bytes];
        self.source.read(slice.tensor, slice.offset, &mut bytes)?;
        Ok(bytes)
    }

    /// The bytes of one part of a merged expert.
    pub fn merged(&mut self, layer: usize, part: &str, group: usize) -> Result<Vec<u8>> {
        self.align(layer, group)?;
        let found = &self.layers[layer];
        let shares = found.groups[group].shares();
        let first = self.slice(found, part, shares[0].0)?;
        if shares.len() == 1 {
            return self.read(&first);
        }
        let alignments = &self.alignments[&(layer, group)];
        with_stored!(first.tensor, T, {
            let mut sums = vec![<T as Element>::Acc::default(); first.rows * first.columns];
            for ((member, share), alignment) in shares.iter().zip(alignments) {
                let slice = self.slice(found, part, *member)?;
                same_form(&slice, &first)?;
                let values = decode::<T>(&self.read(&slice)?, slice.tensor)?;
                let moves = alignment.as_ref().and_then(|a| Moves::new(found, part, a));
                add(&mut sums, &values, *share, slice.columns, moves.as_ref());
            }
            Ok(encode::<T>(&sums))
        })
    }

    /// Finds the alignment of each member that counts to the group's reference, once.
    fn align(&mut self, layer: usize, group: usize) -> Result<()> {
        if self.alignments.contains_key(&(layer, group)) {
            return Ok(());
        }
        let (found, reference) =
            (&self.layers[layer], self.layers[layer].groups[group].reference());
        let shares = found.groups[group].shares();
        let mut alignments = Vec::with_capacity(shares.len());
        let mut target = None;
        for &(member, _) in &shares {
            if found.align == Align::None || member == reference || shares.len() == 1 {
                alignments.push(None);
                continue;
            }
            if target.is_none() {
                target = Some(self.neurons(found, reference)?);
            }
            let target = target.as_ref().expect("filled just above");
            let signs = found.align == Align::PermSign;
            alignments.push(Some(align(target, &self.neurons(found, member)?, signs)?));
        }
        self.alignments.insert((layer, group), alignments);
        Ok(())
    }

    /// One expert's neurons, in float32 whatever the storage.
    fn neurons(&self, layer: &Layer, expert: usize) -> Result<Neurons> {
        let (mut gate, mut linear): (Vec<Rows>, Vec<Rows>) = (Vec::new(), Vec::new());
        for part in layer.tensors.keys() {
            if part == "down_bias" {
                continue; // It belongs to no neuron.
            }
            let slice = self.slice(layer, part, expert)?;
            let rows = self.rows(layer, part, &slice)?;
            match (part.trim_end_matches("_bias"), layer.packing) {
                ("gate", _) => gate.push(rows),
                ("gate_up", packing) => {
                    let (first, second) = rows.split(packing == Packing::Interleaved);
                    gate.push(first);
                    linear.push(second);
                }
                _ => linear.push(rows),
            }
        }
        let count = linear.first().map_or(0, |rows| rows.count);
        if gate.iter().chain(&linear).any(|rows| rows.count != count) {
            let what = format!("parts of expert {expert} of {}", layer.name);
            return Err(Error::value(OP, what, "have the same number of neurons", "others"));
        }
        Ok(Neurons { gate: beside(&gate, count), linear: beside(&linear, count), count })
    }

    /// A part with one row for each neuron (two for gate and up together).
    fn rows(&self, layer: &Layer, part: &str, slice: &Slice<'_>) -> Result<Rows> {
        let bytes = self.read(slice)?;
        let values: Vec<f32> = with_stored!(slice.tensor, T, {
            let values = decode::<T>(&bytes, slice.tensor)?;
            Ok(values.iter().map(|value| value.widen().to_f64() as f32).collect())
        })?;
        let (rows, columns) = (slice.rows, slice.columns);
        if neurons_are_rows(layer, part) {
            return Ok(Rows { values, count: rows, width: columns });
        }
        let mut turned = vec![0.0; values.len()];
        for (row, line) in values.chunks_exact(columns).enumerate() {
            for (column, value) in line.iter().enumerate() {
                turned[column * rows + row] = *value;
            }
        }
        Ok(Rows { values: turned, count: columns, width: rows })
    }
}

/// Whether a part's neurons lie along its first axis.
fn neurons_are_rows(layer: &Layer, part: &str) -> bool {
    part.ends_with("_bias") || (part == "down") == layer.transposed
}

/// A matrix of one row per neuron.
struct Rows {
    values: Vec<f32>,
    count: usize,
    width: usize,
}

impl Rows {
    /// Gate rows and up rows.
    fn split(self, in_turn: bool) -> (Self, Self) {
        let (count, width) = (self.count / 2, self.width);
        let pick = |second: usize| {
            let row = |i: usize| if in_turn { 2 * i + second } else { second * count + i };
            let rows = (0..count).flat_map(|i| &self.values[row(i) * width..][..width]);
            Self { values: rows.copied().collect(), count, width }
        };
        (pick(0), pick(1))
    }
}

/// Puts matrices of one row per neuron beside each other.
fn beside(parts: &[Rows], count: usize) -> Vec<f32> {
    let rows =
        (0..count).flat_map(|i| parts.iter().map(move |p| &p.values[i * p.width..][..p.width]));
    rows.flatten().copied().collect()
}

/// Where each line of a part comes from, along its neuron axis, and with which sign.
struct Moves {
    along_rows: bool,
    from: Vec<usize>,
    flip: Vec<bool>,
}

impl Moves {
    /// None for a part that belongs to no neuron.
    fn new(layer: &Layer, part: &str, alignment: &Alignment) -> Option<Self> {
        let along_rows = neurons_are_rows(layer, part);
        let Alignment { neuron, flip } = alignment;
        let count = neuron.len();
        let same = || vec![false; count];
        let (from, flip) = match (part.trim_end_matches("_bias"), layer.packing) {
            _ if part == "down_bias" => return None,
            ("gate", _) => (neuron.clone(), same()),
            ("gate_up", Packing::Interleaved) => (
                neuron.iter().flat_map(|&n| [2 * n, 2 * n + 1]).collect(),
                flip.iter().flat_map(|&f| [false, f]).collect(),
            ),
            ("gate_up", _) => (
                neuron.iter().copied().chain(neuron.iter().map(|n| n + count)).collect(),
                same().into_iter().chain(flip.iter().copied()).collect(),
            ),
            _ => (neuron.clone(), flip.clone()),
        };
        Some(Self { along_rows, from, flip })
    }
}

fn same_form(slice: &Slice<'_>, first: &Slice<'_>) -> Result<()> {
    let form = |s: &Slice<'_>| (s.tensor.dtype, s.rows, s.columns);
    if form(slice) == form(first) {
        return Ok(());
    }
    let expected =
        format!("be {} of {} x {}", first.tensor.dtype.name(), first.rows, first.columns);
    let got = format!("{} of {} x {}", slice.tensor.dtype.name(), slice.rows, slice.columns);
    Err(Error::value(OP, slice.tensor.name.clone(), expected, got))
}

fn decode<T: Stored>(bytes: &[u8], tensor: &Tensor) -> Result<Vec<T>> {
    let values: Vec<T> = bytes.chunks_exact(size_of::<T>()).map(T::from_bytes).collect();
    match values.iter().find(|value| !value.widen().to_f64().is_finite()) {
        None => Ok(values),
        Some(value) => {
            let got = value.widen().to_f64().to_string();
            Err(Error::value(OP, tensor.name.clone(), "hold finite numbers", got))
        }
    }
}

fn encode<T: Stored>(sums: &[T::Acc]) -> Vec<u8> {
    let mut bytes = vec![0; sums.len() * size_of::<T>()];
    for (into, sum) in bytes.chunks_exact_mut(size_of::<T>()).zip(sums) {
        T::round(*sum).to_bytes(into);
    }
    bytes
}

/// `sums += share · values`, with neurons moved to their places.
fn add<T: Stored>(
    sums: &mut [T::Acc],
    values: &[T],
    share: f64,
    columns: usize,
    moves: Option<&Moves>,
) {
    let share = T::Acc::from_f64(share);
    let signed = |flip: bool| if flip { -share } else { share };
    for (row, sums) in sums.chunks_exact_mut(columns.max(1)).enumerate() {
        match moves {
            Some(moves) if moves.along_rows => {
                let share = signed(moves.flip[row]);
                let values = &values[moves.from[row] * columns..][..columns];
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum += share * value.widen();
                }
            }
            Some(moves) => {
                let values = &values[row * columns..][..columns];
                for ((sum, &from), &flip) in sums.iter_mut().zip(&moves.from).zip(&moves.flip) {
                    *sum += signed(flip) * values[from].widen();
                }
            }
            None => {
                let values = &values[row * columns..][..columns];
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum += share * value.widen();
                }
            }
        }
    }
}

/// Weighted means of slices of a tensor along an axis: router rows, biases, correction vectors.
pub fn mean(source: &Source, from: &Tensor, axis: usize, groups: &[Group]) -> Result<Vec<u8>> {
    let outer: usize = from.shape[..axis].iter().product();
    let inner: usize = from.shape[axis + 1..].iter().product();
    let extent = from.shape[axis];
    let mut bytes = vec![0; from.bytes() as usize];
    source.read(from, 0, &mut bytes)?;
    with_stored!(from, T, {
        let values = decode::<T>(&bytes, from)?;
        let mut out = Vec::with_capacity(outer * groups.len() * inner * size_of::<T>());
        for block in values.chunks_exact((extent * inner).max(1)).take(outer) {
            for group in groups {
                let shares = group.shares();
                let mut sums = vec![<T as Element>::Acc::default(); inner];
                for &(member, share) in &shares {
                    let slice = &block[member * inner..][..inner];
                    add(&mut sums, slice, if shares.len() == 1 { 1.0 } else { share }, inner, None);
                }
                out.extend(encode::<T>(&sums));
            }
        }
        Ok(out)
    })
}
