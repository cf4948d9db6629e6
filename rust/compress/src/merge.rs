//! Weighted means of experts, and of slices such as router rows, in the layout they are stored in.

use crate::align::{Alignment, Neurons, align, profits};
use crate::checkpoint::{Dtype, Source, Tensor};
use crate::error::{Error, Result};
use crate::job::Job;
use crate::recipe::{Align, Group, Layer, Packing};
use ferromoe_core::Element;
use ferromoe_core::chunks::for_each_chunk;
use ferromoe_core::dtype::Accumulator;
use ferromoe_core::threads;
use half::{bf16, f16};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

const OP: &str = "rewrite";
/// What alignments that are sought side by side may take for their profits and neurons.
const ALIGN_BYTES: usize = 1 << 30;
/// Elements that pay for waking a thread.
const GRAIN: usize = 1 << 16;

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
#[derive(Clone, Copy)]
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
    /// By layer.
    alignments: HashMap<usize, Alignments>,
}

/// By group and member.
type Alignments = HashMap<(usize, usize), Alignment>;

/// A member on its way to its group's reference.
struct Pair {
    group: usize,
    reference: usize,
    member: usize,
    /// Shared by the members of a group that are aligned together.
    target: Arc<Neurons>,
    other: Neurons,
    profit: Vec<f32>,
    done: OnceLock<Result<Alignment>>,
}

impl<'a> Merger<'a> {
    /// Nothing is read yet.
    pub fn new(source: &'a Source, layers: &'a [Layer]) -> Self {
        Self { source, layers, alignments: HashMap::new() }
    }

    /// Dtype and shape of an output that holds a part of some groups; checks every member.
    pub fn planned(
        &self,
        layer: usize,
        part: &str,
        groups: &[usize],
        output: &str,
    ) -> Result<(Dtype, Vec<usize>)> {
        let layer = &self.layers[layer];
        let per_expert = layer.tensors[part].contains("{e}");
        if groups.is_empty() || (per_expert && groups.len() != 1) {
            let expected = if per_expert { "be one" } else { "be at least one" };
            let got = groups.len().to_string();
            return Err(Error::value(OP, format!("groups of {output}"), expected, got));
        }
        let mut first = None;
        for &group in groups {
            for &member in &layer.groups[group].members {
                let slice = self.slice(layer, part, member)?;
                same_form(&slice, first.get_or_insert(slice))?;
            }
        }
        let first = first.expect("a group has members");
        with_stored!(first.tensor, T, Ok(size_of::<T>()))?;
        let mut shape = first.tensor.shape.clone();
        if !per_expert {
            shape[0] = groups.len();
        }
        Ok((first.tensor.dtype, shape))
    }

    fn slice(&self, layer: &Layer, part: &str, expert: usize) -> Result<Slice<'a>> {
        let name = &layer.tensors[part];
        let tensor = self.source.tensor(&name.replace("{e}", &expert.to_string()))?;
        let (shape, number) = if name.contains("{e}") {
            (&tensor.shape[..], 0)
        } else {
            let Some((&experts, shape)) = tensor.shape.split_first() else {
                let what = format!("shape of {}", tensor.name);
                return Err(Error::value(OP, what, "begin with the experts", "[]"));
            };
            if expert >= experts {
                let what = format!("members of {}", layer.name);
                return Err(Error::value(
                    OP,
                    what,
                    format!("be below {experts}"),
                    expert.to_string(),
                ));
            }
            (shape, expert)
        };
        let axes = if part.ends_with("_bias") { 1 } else { 2 };
        if shape.len() != axes || tensor.dtype.bits() % 8 != 0 {
            let what = format!("shape of {}", tensor.name);
            let expected = format!("have {axes} axes for each expert");
            return Err(Error::value(OP, what, expected, format!("{:?}", tensor.shape)));
        }
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
    pub fn merged(&mut self, layer: usize, part: &str, group: usize, job: &Job) -> Result<Vec<u8>> {
        job.check()?;
        let found = &self.layers[layer];
        let shares = found.groups[group].shares();
        let first = self.slice(found, part, shares[0].0)?;
        if shares.len() == 1 {
            return self.read(&first);
        }
        if found.align != Align::None && !self.alignments.contains_key(&layer) {
            let alignments = self.align(found, job)?;
            self.alignments.insert(layer, alignments);
        }
        with_stored!(first.tensor, T, {
            let mut sums = vec![<T as Element>::Acc::default(); first.rows * first.columns];
            for (member, share) in shares {
                job.check()?;
                let slice = self.slice(found, part, member)?;
                let bytes = self.read(&slice)?;
                check_finite::<T>(&bytes, slice.tensor)?;
                let alignment = self.alignments.get(&layer).and_then(|a| a.get(&(group, member)));
                let moves = alignment.and_then(|alignment| Moves::new(found, part, alignment));
                add::<T>(&mut sums, &bytes, share, slice.columns, moves.as_ref());
            }
            Ok(encode::<T>(&sums))
        })
    }

    /// Aligns every member of the layer's groups that counts to its group's reference.
    ///
    /// The matrix products use all threads one after the other; the assignments, each of which runs
    /// on one thread, are solved side by side, as many as [`ALIGN_BYTES`] holds.
    fn align(&self, layer: &Layer, job: &Job) -> Result<Alignments> {
        let signs = layer.align == Align::PermSign;
        let mut wanted = Vec::new();
        for (number, group) in layer.groups.iter().enumerate() {
            let shares = group.shares();
            let others =
                shares.iter().filter(|share| shares.len() > 1 && share.0 != group.reference());
            wanted.extend(others.map(|&(member, _)| (number, group.reference(), member)));
        }
        let mut found = Alignments::new();
        let mut wanted = wanted.into_iter().peekable();
        while wanted.peek().is_some() {
            let (mut batch, mut bytes) = (Vec::new(), 0);
            while let Some((group, reference, member)) = wanted.next_if(|_| bytes < ALIGN_BYTES) {
                job.check()?;
                let target = match batch.last() {
                    Some(Pair { reference: known, target, .. }) if *known == reference => {
                        Arc::clone(target)
                    }
                    _ => Arc::new(self.neurons(layer, reference)?),
                };
                let other = self.neurons(layer, member)?;
                let profit = profits(&target, &other, signs, job)?;
                bytes += size_of_val(&profit[..]) + size_of_val(&other.linear[..]);
                let done = OnceLock::new();
                batch.push(Pair { group, reference, member, target, other, profit, done });
                if batch.len() == threads::num_threads() {
                    break;
                }
            }
            threads::for_each(batch.len(), 1, |number| {
                let Pair { target, other, profit, done, .. } = &batch[number];
                let _ = done.set(align(profit, target, other, signs, job)); // Each is set once.
            });
            for Pair { group, member, done, .. } in batch {
                let alignment = done.into_inner().expect("for_each visits every pair")?;
                found.insert((group, member), alignment);
            }
        }
        Ok(found)
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
            check_finite::<T>(&bytes, slice.tensor)?;
            let values = bytes.chunks_exact(size_of::<T>());
            Ok(values.map(|value| T::from_bytes(value).widen().to_f64() as f32).collect())
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

/// Averages of what is no number, or infinite, would hide it in a whole group.
fn check_finite<T: Stored>(bytes: &[u8], tensor: &Tensor) -> Result<()> {
    let finite = |value: &[u8]| T::from_bytes(value).widen().to_f64().is_finite();
    let wrong = AtomicBool::new(false);
    let blocks: Vec<_> = bytes.chunks(GRAIN * size_of::<T>()).collect();
    threads::for_each(blocks.len(), 1, |block| {
        if !blocks[block].chunks_exact(size_of::<T>()).all(finite) {
            wrong.store(true, Ordering::Relaxed);
        }
    });
    if !wrong.into_inner() {
        return Ok(());
    }
    let value = bytes.chunks_exact(size_of::<T>()).find(|value| !finite(value));
    let got = value.map_or(f64::NAN, |value| T::from_bytes(value).widen().to_f64()).to_string();
    Err(Error::value(OP, tensor.name.clone(), "hold finite numbers", got))
}

fn encode<T: Stored>(sums: &[T::Acc]) -> Vec<u8> {
    let mut bytes = vec![0; size_of_val(sums) / size_of::<T::Acc>() * size_of::<T>()];
    for_each_chunk(&mut bytes, GRAIN * size_of::<T>(), 1, |block, bytes| {
        for (into, sum) in bytes.chunks_exact_mut(size_of::<T>()).zip(&sums[block * GRAIN..]) {
            T::round(*sum).to_bytes(into);
        }
    });
    bytes
}

/// `sums += share · values`, with neurons moved to their places. `values` are stored elements.
fn add<T: Stored>(
    sums: &mut [T::Acc],
    values: &[u8],
    share: f64,
    columns: usize,
    moves: Option<&Moves>,
) {
    let share = T::Acc::from_f64(share);
    let signed = |flip: bool| if flip { -share } else { share };
    let rows = (GRAIN / columns.max(1)).max(1);
    for_each_chunk(sums, rows * columns, 1, |block, sums| {
        for (row, sums) in sums.chunks_exact_mut(columns).enumerate() {
            let row = block * rows + row;
            let (from, share) = match moves {
                Some(moves) if moves.along_rows => (moves.from[row], signed(moves.flip[row])),
                _ => (row, share),
            };
            let line = &values[from * columns * size_of::<T>()..][..columns * size_of::<T>()];
            match moves {
                Some(moves) if !moves.along_rows => {
                    for ((sum, &from), &flip) in sums.iter_mut().zip(&moves.from).zip(&moves.flip) {
                        let value = T::from_bytes(&line[from * size_of::<T>()..][..size_of::<T>()]);
                        *sum += signed(flip) * value.widen();
                    }
                }
                _ => {
                    for (sum, value) in sums.iter_mut().zip(line.chunks_exact(size_of::<T>())) {
                        *sum += share * T::from_bytes(value).widen();
                    }
                }
            }
        }
    });
}

/// Weighted means of slices of a tensor along an axis: router rows, biases, correction vectors.
pub fn mean(source: &Source, from: &Tensor, axis: usize, groups: &[Group]) -> Result<Vec<u8>> {
    let outer: usize = from.shape[..axis].iter().product();
    let inner: usize = from.shape[axis + 1..].iter().product();
    let extent = from.shape[axis];
    let mut bytes = vec![0; from.bytes() as usize];
    source.read(from, 0, &mut bytes)?;
    with_stored!(from, T, {
        let slice_bytes = inner * size_of::<T>();
        let mut out = Vec::with_capacity(outer * groups.len() * slice_bytes);
        for block in bytes.chunks_exact((extent * slice_bytes).max(1)).take(outer) {
            let slice = |member: usize| &block[member * slice_bytes..][..slice_bytes];
            for group in groups {
                let shares = group.shares();
                if let [(member, _)] = shares[..] {
                    out.extend_from_slice(slice(member));
                    continue;
                }
                let mut sums = vec![<T as Element>::Acc::default(); inner];
                for (member, share) in shares {
                    check_finite::<T>(slice(member), from)?;
                    add::<T>(&mut sums, slice(member), share, inner, None);
                }
                out.extend(encode::<T>(&sums));
            }
        }
        Ok(out)
    })
}
