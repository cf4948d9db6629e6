//! The layer over weights of 8 or 4 bits.

use crate::error::to_py;
use crate::experts::{Arrays, forward, gradients};
use crate::layer::{Layer, Table};
use crate::tensor::View;
use ferromoe_core::experts::Coded;
use ferromoe_core::experts::codes::Bits;
use ferromoe_core::{Dtype, Error};
use pyo3::prelude::*;

/// Quantised weights as the caller passed them: gate and up, up, down.
pub struct CodedTables<'py> {
    codes: [Table<'py>; 3],
    scales: [Table<'py>; 3],
    group: Option<usize>,
    hidden: usize,
}

impl<'py> CodedTables<'py> {
    fn new(
        op: &'static str,
        [codes, scales]: [[Vec<Bound<'py, PyAny>>; 3]; 2],
        (group, hidden): (Option<usize>, usize),
        x: &View<'py>,
    ) -> PyResult<Self> {
        let mut tables = Vec::with_capacity(6);
        for (arg, list) in ["gate_up", "up", "down"].into_iter().zip(codes) {
            let words = || "int8, or uint8 for two codes in a byte".to_string();
            tables.push(Table::of(op, arg, list, x, (&[Dtype::I8, Dtype::U8], &words))?);
        }
        for (arg, list) in ["gate_up_scale", "up_scale", "down_scale"].into_iter().zip(scales) {
            let words = || "float32".to_string();
            tables.push(Table::of(op, arg, list, x, (&[Dtype::F32], &words))?);
        }
        let Ok([gate_up, up, down, gate_up_scale, up_scale, down_scale]) =
            <[Table<'py>; 6]>::try_from(tables)
        else {
            unreachable!("one table per name")
        };
        let scales = [gate_up_scale, up_scale, down_scale];
        Ok(Self { codes: [gate_up, up, down], scales, group, hidden })
    }

    pub fn checked(&self) -> PyResult<Coded<'_>> {
        let [gate_up, ..] = &self.codes;
        let dtype = gate_up.views.first().map_or(Dtype::I8, View::dtype);
        let bits = if dtype == Dtype::U8 { Bits::Four } else { Bits::Eight };
        let mut lists = Vec::with_capacity(3);
        for (codes, scales) in self.codes.iter().zip(&self.scales) {
            if let Some(other) = codes.views.iter().find(|view| view.dtype() != dtype) {
                return Err(other.type_error(&format!("of the dtype of gate_up, {}", dtype.name())));
            }
            let (matrices, scale) = (codes.matrices::<u8>()?, scales.matrices::<f32>()?);
            if matrices.len() != scale.len() {
                let expected =
                    format!("hold one tensor for each of the {} experts", matrices.len());
                let (op, arg, got) = (scales.op, scales.arg, scale.len().to_string());
                return Err(to_py(Error::Value { op, arg, expected, got }));
            }
            let pairs = matrices.into_iter().zip(scale);
            lists.push(pairs.map(|((codes, [n, _]), (scales, _))| (codes, scales, n)).collect());
        }
        let Ok([gate_up, up, down]) = <[Vec<_>; 3]>::try_from(lists) else {
            unreachable!("three tables")
        };
        Ok(Coded { gate_up, up, down, bits, group: self.group, hidden: self.hidden })
    }
}

type CodedGradients<'py> =
    (Option<Bound<'py, PyAny>>, Arrays<'py>, Arrays<'py>, Arrays<'py>, Option<Bound<'py, PyAny>>);

/// Quantised weights in place of the first three lists, never turned.
#[pyfunction]
#[pyo3(signature = (
    x, gate_up, up, down, gate_up_scale, up_scale, down_scale, topk_ids, topk_weights,
    gate_up_bias, up_bias, down_bias, packing, activation, limit, alpha, sentinel, weight_on_input,
    hidden, group
))]
pub fn experts_quantized<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    gate_up: Vec<Bound<'py, PyAny>>,
    up: Vec<Bound<'py, PyAny>>,
    down: Vec<Bound<'py, PyAny>>,
    gate_up_scale: Vec<Bound<'py, PyAny>>,
    up_scale: Vec<Bound<'py, PyAny>>,
    down_scale: Vec<Bound<'py, PyAny>>,
    topk_ids: &Bound<'py, PyAny>,
    topk_weights: &Bound<'py, PyAny>,
    gate_up_bias: Vec<Bound<'py, PyAny>>,
    up_bias: Vec<Bound<'py, PyAny>>,
    down_bias: Vec<Bound<'py, PyAny>>,
    packing: &str,
    activation: &str,
    limit: f64,
    alpha: f64,
    sentinel: i64,
    weight_on_input: bool,
    hidden: usize,
    group: Option<usize>,
) -> PyResult<Bound<'py, PyAny>> {
    let lists = [Vec::new(), Vec::new(), Vec::new(), gate_up_bias, up_bias, down_bias];
    let options = (packing, false, activation, limit, alpha, sentinel, weight_on_input);
    let mut layer = Layer::new("experts", x, lists, topk_ids, topk_weights, options)?;
    let coded = [[gate_up, up, down], [gate_up_scale, up_scale, down_scale]];
    layer.coded = Some(CodedTables::new(layer.op, coded, (group, hidden), &layer.tokens.x)?);
    forward(py, &layer, None)
}

/// The gradients of `experts_quantized`; `needs` says for which of x, biases, `topk_weights`.
#[pyfunction]
pub fn experts_quantized_backward<'py>(
    py: Python<'py>,
    grad: &Bound<'py, PyAny>,
    x: &Bound<'py, PyAny>,
    gate_up: Vec<Bound<'py, PyAny>>,
    up: Vec<Bound<'py, PyAny>>,
    down: Vec<Bound<'py, PyAny>>,
    gate_up_scale: Vec<Bound<'py, PyAny>>,
    up_scale: Vec<Bound<'py, PyAny>>,
    down_scale: Vec<Bound<'py, PyAny>>,
    topk_ids: &Bound<'py, PyAny>,
    topk_weights: &Bound<'py, PyAny>,
    gate_up_bias: Vec<Bound<'py, PyAny>>,
    up_bias: Vec<Bound<'py, PyAny>>,
    down_bias: Vec<Bound<'py, PyAny>>,
    packing: &str,
    activation: &str,
    limit: f64,
    alpha: f64,
    sentinel: i64,
    weight_on_input: bool,
    hidden: usize,
    group: Option<usize>,
    needs: (bool, bool, bool),
) -> PyResult<CodedGradients<'py>> {
    let lists = [Vec::new(), Vec::new(), Vec::new(), gate_up_bias, up_bias, down_bias];
    let options = (packing, false, activation, limit, alpha, sentinel, weight_on_input);
    let mut layer = Layer::new("experts_backward", x, lists, topk_ids, topk_weights, options)?;
    let coded = [[gate_up, up, down], [gate_up_scale, up_scale, down_scale]];
    layer.coded = Some(CodedTables::new(layer.op, coded, (group, hidden), &layer.tokens.x)?);
    let needs = (needs.0, false, needs.1, needs.2);
    let (dx, _, _, _, gate_up_bias, up_bias, down_bias, dw) =
        gradients(py, &layer, grad, None, needs)?;
    Ok((dx, gate_up_bias, up_bias, down_bias, dw))
}
