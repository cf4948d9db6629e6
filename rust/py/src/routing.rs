//! `route`, its parts and their gradients, and the check of its options.

use crate::error::{no_kernel, to_py};
use crate::output::Output;
use crate::permute::accumulators;
use crate::run::run;
use crate::tensor::{Device, Pod, View};
use crate::with_float;
use ferromoe_core::error::check_shape;
use ferromoe_core::routing::{
    self as core, GroupScore, Logits, Mask, Options, Renorm, Score, Sequences, TopkOn,
};
use ferromoe_core::{Dtype, Element, Error};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::PyTuple;
use std::borrow::Cow;

fn count(arg: &'static str, value: i64) -> PyResult<usize> {
    usize::try_from(value).map_err(|_| {
        let (expected, got) = ("be at least 0".into(), value.to_string());
        to_py(Error::Value { op: "route", arg, expected, got })
    })
}

/// What stands behind the tensors of every function here, in the schema's order.
fn parse(args: &Bound<'_, PyTuple>) -> PyResult<Options> {
    let item = |index| args.get_borrowed_item(index);
    let text = |index| item(index)?.extract::<PyBackedStr>();
    let number = |index| item(index)?.extract::<f64>();
    let count = |index, arg| count(arg, item(index)?.extract()?);
    let renorm = item(7)?.extract::<Option<PyBackedStr>>()?;
    Ok(Options {
        top_k: count(0, "top_k")?,
        score: Score::of(&text(1)?).map_err(to_py)?,
        topk_on: TopkOn::of(&text(2)?).map_err(to_py)?,
        num_groups: count(3, "num_groups")?,
        topk_groups: count(4, "topk_groups")?,
        group_score: GroupScore::of(&text(5)?).map_err(to_py)?,
        group_fill: number(6)?,
        renorm: Renorm::of(renorm.as_deref(), number(8)?).map_err(to_py)?,
        eps: number(9)?,
        scale: number(10)?,
        logit_scale: number(11)?,
        softcap: item(12)?.extract()?,
        num_shared: count(13, "num_shared")?,
    })
}

/// The logits and options that every function here begins with.
struct Router<'py> {
    op: &'static str,
    logits: View<'py>,
    mask: Option<View<'py>>,
    tokens: usize,
    experts: usize,
    options: Options,
}

impl<'py> Router<'py> {
    fn new(
        op: &'static str,
        router_logits: &Bound<'py, PyAny>,
        expert_mask: Option<&Bound<'py, PyAny>>,
        options: &Bound<'py, PyTuple>,
    ) -> PyResult<Self> {
        let options = parse(options)?;
        let logits = View::with_row_stride(op, "router_logits", router_logits)?;
        let [tokens, experts] = logits.dims("[T, E]")?;
        options.check(experts).map_err(to_py)?;
        let mask = expert_mask.map(|mask| View::new(op, "expert_mask", mask)).transpose()?;
        let router = Self { op, logits, mask, tokens, experts, options };
        if let Some(mask) = &router.mask {
            mask.same_device(&router.logits)?;
            mask.of_bool()?;
            let routed = router.routed();
            if mask.shape() != [routed] {
                check_shape(op, "expert_mask", mask.shape(), &[tokens, routed]).map_err(to_py)?;
            }
        }
        Ok(router)
    }

    fn routed(&self) -> usize {
        self.experts - self.options.num_shared
    }

    /// T and the slots of a token.
    fn slots(&self) -> [usize; 2] {
        [self.tokens, self.options.slots()]
    }

    /// The type of weights and of the arithmetic: float64 for float64 logits, else float32.
    fn wide(&self) -> Dtype {
        if self.logits.dtype() == Dtype::F64 { Dtype::F64 } else { Dtype::F32 }
    }

    fn logits<T: Pod>(&self) -> PyResult<Logits<'_, T>> {
        let (values, stride) = self.logits.rows::<T>()?;
        let mask = match &self.mask {
            Some(mask) => Some(Mask { values: mask.bytes()?, per_token: mask.shape().len() > 1 }),
            None => None,
        };
        Ok(Logits { values, tokens: self.tokens, experts: self.experts, stride, mask })
    }

    /// `[T, K]` ids on the device of the logits.
    fn ids(&self, topk_ids: &Bound<'py, PyAny>) -> PyResult<View<'py>> {
        let ids = View::new(self.op, "topk_ids", topk_ids)?;
        ids.same_device(&self.logits)?;
        check_shape(self.op, "topk_ids", ids.shape(), &self.slots()).map_err(to_py)?;
        Ok(ids)
    }

    fn no_kernel<R>(&self) -> PyResult<R> {
        Err(no_kernel(self.op))
    }
}

/// int32 ids as they lie, or int64 ids made narrower.
fn narrow<'a>(op: &'static str, ids: &'a View<'_>) -> PyResult<Cow<'a, [i32]>> {
    match ids.dtype() {
        Dtype::I32 => Ok(Cow::Borrowed(ids.slice()?)),
        Dtype::I64 => {
            let narrowed = ids.slice::<i64>()?.iter().enumerate().map(|(slot, &id)| {
                i32::try_from(id).map_err(|_| {
                    let (expected, got) = ("fit in int32".into(), format!("{id} at slot {slot}"));
                    to_py(Error::Value { op, arg: "topk_ids", expected, got })
                })
            });
            Ok(Cow::Owned(narrowed.collect::<PyResult<_>>()?))
        }
        _ => Err(ids.type_error("int32 or int64")),
    }
}

/// Fails as `route` would for so many experts.
#[pyfunction]
#[pyo3(signature = (num_experts, *options))]
pub fn check_route(num_experts: i64, options: &Bound<'_, PyTuple>) -> PyResult<()> {
    parse(options)?.check(count("num_experts", num_experts)?).map_err(to_py)
}

/// `(topk_weights, topk_ids)`.
#[pyfunction]
#[pyo3(signature = (router_logits, bias, expert_mask, *options))]
pub fn route<'py>(
    py: Python<'py>,
    router_logits: &Bound<'py, PyAny>,
    bias: Option<&Bound<'py, PyAny>>,
    expert_mask: Option<&Bound<'py, PyAny>>,
    options: &Bound<'py, PyTuple>,
) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
    const OP: &str = "route";
    let router = Router::new(OP, router_logits, expert_mask, options)?;
    let bias = bias.map(|bias| View::new(OP, "bias", bias)).transpose()?;
    if let Some(bias) = &bias {
        bias.same_device(&router.logits)?;
        check_shape(OP, "bias", bias.shape(), &[router.routed()]).map_err(to_py)?;
    }
    let mut weights = Output::empty(&router.logits, &router.slots(), router.wide())?;
    let mut ids = Output::empty(&router.logits, &router.slots(), Dtype::I32)?;
    match router.logits.device() {
        Device::Cpu => with_float!(router.logits, T, {
            let (logits, options) = (router.logits::<T>()?, &router.options);
            let bias = bias.as_ref().map(accumulators::<<T as Element>::Acc>).transpose()?;
            let (weights, ids) = (weights.slice_mut()?, ids.slice_mut()?);
            run(py, || core::route(logits, bias.as_deref(), options, weights, ids))?;
        }),
        Device::Cuda(_) => return router.no_kernel(),
    }
    Ok((weights.into_array(), ids.into_array()))
}

/// `topk_weights` of ids that are given.
#[pyfunction]
#[pyo3(signature = (router_logits, topk_ids, expert_mask, *options))]
pub fn route_weights<'py>(
    py: Python<'py>,
    router_logits: &Bound<'py, PyAny>,
    topk_ids: &Bound<'py, PyAny>,
    expert_mask: Option<&Bound<'py, PyAny>>,
    options: &Bound<'py, PyTuple>,
) -> PyResult<Bound<'py, PyAny>> {
    const OP: &str = "route";
    let router = Router::new(OP, router_logits, expert_mask, options)?;
    let ids = router.ids(topk_ids)?;
    let mut weights = Output::empty(&router.logits, &router.slots(), router.wide())?;
    match router.logits.device() {
        Device::Cpu => with_float!(router.logits, T, {
            let (logits, options, ids) =
                (router.logits::<T>()?, &router.options, narrow(OP, &ids)?);
            let weights = weights.slice_mut()?;
            run(py, || core::route_weights(logits, &ids, options, weights))?;
        }),
        Device::Cuda(_) => return router.no_kernel(),
    }
    Ok(weights.into_array())
}

/// `topk_ids` of `route_topp`, as wide as `options` say; its weights come from `route_weights`.
#[pyfunction]
#[pyo3(signature = (router_logits, p, min_k, *options))]
pub fn route_topp<'py>(
    py: Python<'py>,
    router_logits: &Bound<'py, PyAny>,
    p: f64,
    min_k: i64,
    options: &Bound<'py, PyTuple>,
) -> PyResult<Bound<'py, PyAny>> {
    const OP: &str = "route_topp";
    let router = Router::new(OP, router_logits, None, options)?;
    let min_k = count("min_k", min_k)?;
    let mut ids = Output::empty(&router.logits, &router.slots(), Dtype::I32)?;
    match router.logits.device() {
        Device::Cpu => with_float!(router.logits, T, {
            let (logits, options) = (router.logits::<T>()?, &router.options);
            let ids = ids.slice_mut()?;
            run(py, || core::route_topp(logits, p, min_k, options, ids))?;
        }),
        Device::Cuda(_) => return router.no_kernel(),
    }
    Ok(ids.into_array())
}

/// Gradient of `route` for the logits, in their dtype.
#[pyfunction]
#[pyo3(signature = (grad, router_logits, topk_ids, expert_mask, biased, *options))]
pub fn route_backward<'py>(
    py: Python<'py>,
    grad: &Bound<'py, PyAny>,
    router_logits: &Bound<'py, PyAny>,
    topk_ids: &Bound<'py, PyAny>,
    expert_mask: Option<&Bound<'py, PyAny>>,
    biased: bool,
    options: &Bound<'py, PyTuple>,
) -> PyResult<Bound<'py, PyAny>> {
    const OP: &str = "route_backward";
    let router = Router::new(OP, router_logits, expert_mask, options)?;
    let grad = View::new(OP, "grad", grad)?;
    check_shape(OP, "grad", grad.shape(), &router.slots()).map_err(to_py)?;
    let ids = router.ids(topk_ids)?;
    let view = &router.logits;
    let mut out = Output::empty(&router.logits, view.shape(), view.dtype())?;
    match view.device() {
        Device::Cpu => with_float!(view, T, {
            let (logits, options, ids) =
                (router.logits::<T>()?, &router.options, narrow(OP, &ids)?);
            let (grad, out) = (grad.slice()?, out.slice_mut::<T>()?);
            run(py, || core::route_backward(grad, logits, &ids, biased, options, out))?;
        }),
        Device::Cuda(_) => return router.no_kernel(),
    }
    Ok(out.into_array())
}

fn sequences<'a>(
    router: &Router<'_>,
    padding_mask: Option<&'a View<'_>>,
    num_sequences: i64,
) -> PyResult<Sequences<'a>> {
    if let Some(mask) = padding_mask {
        mask.same_device(&router.logits)?;
        mask.of_bool()?;
        check_shape(router.op, "padding_mask", mask.shape(), &[router.tokens]).map_err(to_py)?;
    }
    let real = padding_mask.map(View::bytes).transpose()?;
    Ok(Sequences { count: count("stats", num_sequences)?, real })
}

/// `(expert_counts, prob_sums)`, `[B, E]` each.
#[pyfunction]
#[pyo3(signature = (router_logits, topk_ids, expert_mask, padding_mask, num_sequences, *options))]
pub fn route_stats<'py>(
    py: Python<'py>,
    router_logits: &Bound<'py, PyAny>,
    topk_ids: &Bound<'py, PyAny>,
    expert_mask: Option<&Bound<'py, PyAny>>,
    padding_mask: Option<&Bound<'py, PyAny>>,
    num_sequences: i64,
    options: &Bound<'py, PyTuple>,
) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
    const OP: &str = "route";
    let router = Router::new(OP, router_logits, expert_mask, options)?;
    let ids = router.ids(topk_ids)?;
    let padding = padding_mask.map(|mask| View::new(OP, "padding_mask", mask)).transpose()?;
    let sequences = sequences(&router, padding.as_ref(), num_sequences)?;
    let shape = [sequences.count, router.routed()];
    let mut counts = Output::empty(&router.logits, &shape, Dtype::I32)?;
    let mut sums = Output::empty(&router.logits, &shape, router.wide())?;
    match router.logits.device() {
        Device::Cpu => with_float!(router.logits, T, {
            let (logits, options, ids) =
                (router.logits::<T>()?, &router.options, narrow(OP, &ids)?);
            let (counts, sums) = (counts.slice_mut()?, sums.slice_mut()?);
            run(py, || core::route_stats(logits, &ids, sequences, options, counts, sums))?;
        }),
        Device::Cuda(_) => return router.no_kernel(),
    }
    Ok((counts.into_array(), sums.into_array()))
}

/// Gradient of `prob_sums` for the logits, in their dtype.
#[pyfunction]
#[pyo3(signature = (grad, router_logits, expert_mask, padding_mask, num_sequences, *options))]
pub fn route_stats_backward<'py>(
    py: Python<'py>,
    grad: &Bound<'py, PyAny>,
    router_logits: &Bound<'py, PyAny>,
    expert_mask: Option<&Bound<'py, PyAny>>,
    padding_mask: Option<&Bound<'py, PyAny>>,
    num_sequences: i64,
    options: &Bound<'py, PyTuple>,
) -> PyResult<Bound<'py, PyAny>> {
    const OP: &str = "route_stats_backward";
    let router = Router::new(OP, router_logits, expert_mask, options)?;
    let grad = View::new(OP, "grad", grad)?;
    let padding = padding_mask.map(|mask| View::new(OP, "padding_mask", mask)).transpose()?;
    let sequences = sequences(&router, padding.as_ref(), num_sequences)?;
    check_shape(OP, "grad", grad.shape(), &[sequences.count, router.routed()]).map_err(to_py)?;
    let view = &router.logits;
    let mut out = Output::empty(&router.logits, view.shape(), view.dtype())?;
    match view.device() {
        Device::Cpu => with_float!(view, T, {
            let (logits, options) = (router.logits::<T>()?, &router.options);
            let (grad, out) = (grad.slice()?, out.slice_mut::<T>()?);
            run(py, || core::route_stats_backward(grad, logits, sequences, options, out))?;
        }),
        Device::Cuda(_) => return router.no_kernel(),
    }
    Ok(out.into_array())
}
