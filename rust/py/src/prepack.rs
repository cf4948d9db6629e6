//! Weights in the order in which the kernels read them, and the layer over them.

use crate::error::{no_kernel, to_py};
use crate::experts::{Arrays, each_mut};
use crate::layer::{Table, Tokens, function, packing_of};
use crate::output::Output;
use crate::run::run;
use crate::tensor::{Device, Pod, View};
use crate::with_float;
use ferromoe_core::Error;
use ferromoe_core::experts::{
    self as core, Activation, Experts, Extras, Format, Function, Packing, Tensors, batch_invariant,
    set_batch_invariant,
};
use pyo3::prelude::*;

/// Panels of the first and of the second matmul, the bias of the first in halves; features of each
/// expert, width of x, width of the result.
type Packed<'py> = (Arrays<'py>, Arrays<'py>, Arrays<'py>, Vec<usize>, usize, usize);

#[pyfunction]
pub fn prepack<'py>(
    py: Python<'py>,
    gate_up: Vec<Bound<'py, PyAny>>,
    up: Vec<Bound<'py, PyAny>>,
    down: Vec<Bound<'py, PyAny>>,
    gate_up_bias: Vec<Bound<'py, PyAny>>,
    up_bias: Vec<Bound<'py, PyAny>>,
    down_bias: Vec<Bound<'py, PyAny>>,
    packing: &str,
    transposed: bool,
) -> PyResult<Packed<'py>> {
    const OP: &str = "prepack";
    let first = View::any_strides(OP, "gate_up", &gate_up[0])?;
    first.on_cpu()?;
    let dtype = first.dtype();
    let expected = || format!("of the dtype of gate_up, {}", dtype.name());
    let table = |arg, list| Table::of(OP, arg, list, &first, (&[dtype], &expected));
    let (gate_up, up, down) = (table("gate_up", gate_up)?, table("up", up)?, table("down", down)?);
    let biases = [table("gate_up_bias", gate_up_bias)?, table("up_bias", up_bias)?];
    let down_bias = table("down_bias", down_bias)?;
    let packing = packing_of(OP, packing)?;
    with_float!(first, T, {
        let tensors = Tensors {
            gate_up: gate_up.matrices()?,
            up: up.matrices()?,
            down: down.matrices()?,
            gate_up_bias: biases[0].vectors()?,
            up_bias: biases[1].vectors()?,
            down_bias: down_bias.vectors()?,
        };
        let experts =
            Experts::<T>::new(OP, tensors, packing, transposed, IDENTITY).map_err(to_py)?;
        let format = Format::of::<T>().map_err(to_py)?;
        let columns = columns(packing);
        let features: Vec<_> = (0..experts.count()).map(|e| experts.features(e)).collect();
        let outputs = |shapes: Vec<Vec<usize>>| stacked_or_each(&first, &shapes);
        let mut panels = outputs(
            features.iter().map(|&n| format.shape(n, columns, experts.hidden).into()).collect(),
        )?;
        let mut last = outputs(
            features.iter().map(|&k| format.shape(experts.hidden_out, 1, k).into()).collect(),
        )?;
        let count = experts.count();
        let (into, out_of) =
            (each_mut::<T>(&mut panels, count, 4)?, each_mut::<T>(&mut last, count, 4)?);
        run(py, || core::prepack(&experts, into, out_of))?;
        let mut bias = Vec::new();
        if !biases[0].views.is_empty() {
            bias = outputs(features.iter().map(|&n| vec![columns * n]).collect())?;
            for (e, out) in each_mut::<T>(&mut bias, count, 1)?.into_iter().enumerate() {
                let input = experts.input(e);
                for (at, out) in out.iter_mut().enumerate() {
                    let (part, column) = input.column(at % features[e], at / features[e]);
                    *out = part.bias[column];
                }
            }
        }
        let (hidden, hidden_out) = (experts.hidden, experts.hidden_out);
        let arrays = |list: Vec<Output<'py>>| list.into_iter().map(Output::into_array).collect();
        Ok((arrays(panels), arrays(last), arrays(bias), features, hidden, hidden_out))
    })
}

/// Packing knows no activation.
const IDENTITY: Activation =
    Activation { function: Function::Relu, limit: f64::INFINITY, alpha: 0.0 };

fn columns(packing: Packing) -> usize {
    if packing == Packing::Ungated { 1 } else { 2 }
}

/// One array for all experts if they have one shape, else one each.
fn stacked_or_each<'py>(like: &View<'py>, shapes: &[Vec<usize>]) -> PyResult<Vec<Output<'py>>> {
    if shapes.windows(2).all(|pair| pair[0] == pair[1]) {
        let mut shape = vec![shapes.len()];
        shape.extend(shapes.first().into_iter().flatten());
        return Ok(vec![Output::empty(like, &shape, like.dtype())?]);
    }
    shapes.iter().map(|shape| Output::empty(like, shape, like.dtype())).collect()
}

/// Panels of one projection of all experts, checked.
fn panels<'a, T: Pod>(
    table: &'a Table<'_>,
    (op, arg): (&'static str, &'static str),
    matrices: &[[usize; 2]],
    columns: usize,
    format: Format,
) -> PyResult<Vec<core::weights::Tensor<'a, T>>> {
    let found = table.extents::<4>()?;
    if found.len() != matrices.len() {
        let expected = format!("hold panels of each of the {} experts", matrices.len());
        return Err(to_py(Error::Value { op, arg, expected, got: found.len().to_string() }));
    }
    let slices = table.slices(found.len(), 4)?;
    let mut tensors = Vec::with_capacity(slices.len());
    for ((&[n, k], found), slice) in matrices.iter().zip(found).zip(slices) {
        let expected = format.shape(n / columns, columns, k);
        if found[2..] != expected[2..] {
            let expected = format!(
                "be packed for this machine, {} columns by {}: call prepack again, on the original \
                 weights (FERROMOE_ISA changes the machine too)",
                format.cols, format.group
            );
            let got = format!("{} by {}", found[2], found[3]);
            return Err(to_py(Error::Value { op, arg, expected, got }));
        }
        if found != expected {
            let (expected, got) = (format!("{expected:?}"), found.into());
            return Err(to_py(Error::Shape { op, arg, expected, got }));
        }
        tensors.push((slice, [n, k]));
    }
    Ok(tensors)
}

/// The layer over panels. `features` holds one number for all experts, or one each.
#[pyfunction]
#[pyo3(signature = (
    x, gate_up, down, topk_ids, topk_weights, gate_up_bias, down_bias, features, hidden, hidden_out,
    packing, activation, limit, alpha, sentinel, weight_on_input, out=None
))]
pub fn packed_experts<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    gate_up: Vec<Bound<'py, PyAny>>,
    down: Vec<Bound<'py, PyAny>>,
    topk_ids: &Bound<'py, PyAny>,
    topk_weights: &Bound<'py, PyAny>,
    gate_up_bias: Vec<Bound<'py, PyAny>>,
    down_bias: Vec<Bound<'py, PyAny>>,
    features: Vec<usize>,
    hidden: usize,
    hidden_out: usize,
    packing: &str,
    activation: &str,
    limit: f64,
    alpha: f64,
    sentinel: i64,
    weight_on_input: bool,
    out: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyAny>> {
    const OP: &str = "experts";
    let tokens = Tokens::new(OP, x, topk_ids, topk_weights, sentinel, weight_on_input)?;
    let table = |arg, list| Table::new(OP, arg, list, &tokens.x);
    let tables = [
        table("gate_up", gate_up)?,
        table("down", down)?,
        table("gate_up_bias", gate_up_bias)?,
        table("down_bias", down_bias)?,
    ];
    if tokens.x.device() != Device::Cpu {
        return Err(no_kernel(OP));
    }
    let packing = packing_of(OP, packing)?;
    let activation = Activation { function: function(OP, activation)?, limit, alpha };
    let count = tables[0].extents::<4>()?.len();
    let features = if let [one] = features[..] { vec![one; count] } else { features };
    let columns = columns(packing);
    let into: Vec<_> = features.iter().map(|&n| [columns * n, hidden]).collect();
    let out_of: Vec<_> = features.iter().map(|&k| [hidden_out, k]).collect();
    with_float!(tokens.x, T, {
        let format = Format::of::<T>().map_err(to_py)?;
        let tensors = Tensors {
            gate_up: panels(&tables[0], (OP, "gate_up"), &into, columns, format)?,
            up: Vec::new(),
            down: panels(&tables[1], (OP, "down"), &out_of, 1, format)?,
            gate_up_bias: tables[2].vectors()?,
            up_bias: Vec::new(),
            down_bias: tables[3].vectors()?,
        };
        let experts =
            Experts::<T>::packed(OP, tensors, packing, activation, format).map_err(to_py)?;
        let call = tokens.call::<T>()?;
        let mut out = tokens.result(out, &[call.tokens, hidden_out], &tables)?;
        let values = out.slice_mut::<T>()?;
        run(py, || core::forward(&call, &experts, values, Extras::default()))?;
        Ok(out.into_array())
    })
}

/// Switches batch invariance on or off, or leaves it; returns what held before.
#[pyfunction]
#[pyo3(signature = (on=None))]
pub fn switch_batch_invariant(on: Option<bool>) -> bool {
    on.map_or_else(batch_invariant, set_batch_invariant)
}
