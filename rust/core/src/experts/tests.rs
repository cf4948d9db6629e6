//! What the Python tests, which compare with PyTorch, cannot see: bits, threads, stale memory.

use super::*;
use crate::threads;

/// A layer whose numbers depend on `seed` only.
struct Layer {
    x: Vec<f32>,
    ids: Vec<i32>,
    topk_weights: Vec<f32>,
    gate_up: Vec<f32>,
    down: Vec<f32>,
}

const TOKENS: usize = 70;
const TOP_K: usize = 3;
const EXPERTS: usize = 5;
const HIDDEN: usize = 72;
const FEATURES: usize = 130;

fn numbers(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

impl Layer {
    fn new() -> Self {
        // Expert 0 gets most slots, expert 3 none, and some slots choose nobody.
        let ids = numbers(TOKENS * TOP_K, 1).into_iter().map(|r| match (r * 8.0) as i32 {
            -7 => -1,
            1..=2 => 1,
            3..=4 => 2,
            5.. => 4,
            _ => 0,
        });
        Self {
            x: numbers(TOKENS * HIDDEN, 2),
            ids: ids.collect(),
            topk_weights: numbers(TOKENS * TOP_K, 3),
            gate_up: numbers(EXPERTS * 2 * FEATURES * HIDDEN, 4),
            down: numbers(EXPERTS * HIDDEN * FEATURES, 5),
        }
    }

    fn call(&self) -> Call<'_, f32> {
        Call {
            x: &self.x,
            tokens: TOKENS,
            hidden: HIDDEN,
            topk_ids: Ids::I32(&self.ids),
            topk_weights: TopkWeights::Float(&self.topk_weights),
            top_k: TOP_K,
            sentinel: -1,
            weight_on_input: false,
        }
    }

    fn experts(&self) -> Experts<'_, f32> {
        let up = [2 * FEATURES, HIDDEN];
        let down = [HIDDEN, FEATURES];
        let tensors = Tensors {
            gate_up: self.gate_up.chunks_exact(up[0] * up[1]).map(|w| (w, up)).collect(),
            up: Vec::new(),
            down: self.down.chunks_exact(down[0] * down[1]).map(|w| (w, down)).collect(),
            gate_up_bias: Vec::new(),
            up_bias: Vec::new(),
            down_bias: Vec::new(),
        };
        let activation =
            Activation { function: Function::Silu, limit: f64::INFINITY, alpha: 1.702 };
        Experts::new("experts", tensors, Packing::Halves, false, activation).unwrap()
    }

    fn forward(&self) -> Vec<f32> {
        let mut out = vec![f32::NAN; TOKENS * HIDDEN];
        forward(&self.call(), &self.experts(), &mut out, Extras::default()).unwrap();
        out
    }
}

/// Output, counts, largest values, sums of squares, weighted norms.
type WithStats = (Vec<f32>, Vec<i32>, [Vec<f32>; 3]);

impl Layer {
    fn forward_with_stats(&self) -> WithStats {
        let mut out = vec![f32::NAN; TOKENS * HIDDEN];
        let mut counts = vec![-1; EXPERTS];
        let mut sums = [(); 3].map(|()| vec![f32::NAN; EXPERTS]);
        let [max_abs, sum_squares, weighted_norms] = &mut sums;
        let stats = Statistics { counts: &mut counts, max_abs, sum_squares, weighted_norms };
        let extras = Extras { stats: Some(stats), activations: None };
        forward(&self.call(), &self.experts(), &mut out, extras).unwrap();
        (out, counts, sums)
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Runs `f` where [`threads::for_each`] works on the calling thread alone.
fn alone<R: Send>(f: impl Fn() -> R + Sync) -> R {
    let result = std::sync::Mutex::new(None);
    // Inside a for_each, another one runs inline.
    threads::for_each(2, 1, |i| {
        if i == 0 {
            *result.lock().unwrap() = Some(f());
        }
    });
    result.into_inner().unwrap().expect("item 0 has run")
}

#[test]
fn one_thread_and_many_give_the_same_bits() {
    let layer = Layer::new();
    let (many, one) = (layer.forward(), alone(|| layer.forward()));
    assert!(many.iter().all(|value| value.is_finite()));
    assert_eq!(bits(&many), bits(&one));
    // Workspaces hold what the first call left; nothing may depend on it.
    assert_eq!(bits(&many), bits(&layer.forward()));
}

#[test]
fn statistics_have_the_same_bits_too_and_leave_the_output_alone() {
    let layer = Layer::new();
    let (out, counts, sums) = layer.forward_with_stats();
    let (one_out, one_counts, one_sums) = alone(|| layer.forward_with_stats());
    assert_eq!(bits(&out), bits(&layer.forward()));
    assert_eq!(bits(&out), bits(&one_out));
    assert_eq!(counts, one_counts);
    for (e, count) in (0..).zip(counts) {
        assert_eq!(count as usize, layer.ids.iter().filter(|id| **id == e).count());
    }
    for (sums, one) in sums.iter().zip(&one_sums) {
        assert_eq!(bits(sums), bits(one));
        assert_eq!(sums[3], 0.0);
        assert!(sums.iter().all(|sum| sum.is_finite()));
    }
}

#[test]
fn gradients_have_the_same_bits_too_and_zeros_for_idle_experts() {
    let layer = Layer::new();
    let grad = numbers(TOKENS * HIDDEN, 6);
    let run = || {
        let mut dx = vec![f32::NAN; layer.x.len()];
        let mut gate_up = vec![f32::NAN; layer.gate_up.len()];
        let mut down = vec![f32::NAN; layer.down.len()];
        let mut topk_weights = vec![f32::NAN; layer.topk_weights.len()];
        let out = Gradients {
            x: Some(&mut dx),
            gate_up: gate_up.chunks_exact_mut(2 * FEATURES * HIDDEN).collect(),
            down: down.chunks_exact_mut(HIDDEN * FEATURES).collect(),
            topk_weights: Some(&mut topk_weights),
            ..Gradients::default()
        };
        backward(&grad, &layer.call(), &layer.experts(), None, out).unwrap();
        [dx, gate_up, down, topk_weights]
    };
    let (many, one) = (run(), alone(run));
    for (many, one) in many.iter().zip(&one) {
        assert!(many.iter().all(|value| value.is_finite()));
        assert_eq!(bits(many), bits(one));
    }
    assert!(
        many[1][3 * 2 * FEATURES * HIDDEN..][..2 * FEATURES * HIDDEN].iter().all(|g| *g == 0.0)
    );
    for (gradient, id) in many[3].iter().zip(&layer.ids) {
        assert_eq!(*gradient == 0.0, *id == -1);
    }
}

#[test]
fn not_a_number_stays_with_its_token_and_its_slot() {
    let mut layer = Layer::new();
    let clean = layer.forward();
    layer.x[HIDDEN..2 * HIDDEN].fill(f32::NAN);
    for (weight, id) in layer.topk_weights.iter_mut().zip(&layer.ids) {
        if *id == -1 {
            *weight = f32::NAN;
        }
    }
    let dirty = layer.forward();
    assert!(dirty[HIDDEN..2 * HIDDEN].iter().all(|value| value.is_nan()));
    assert_eq!(bits(&clean[..HIDDEN]), bits(&dirty[..HIDDEN]));
    assert_eq!(bits(&clean[2 * HIDDEN..]), bits(&dirty[2 * HIDDEN..]));
}

/// The first `tokens` tokens of a layer, computed with weights that were packed.
fn packed_forward(layer: &Layer, tokens: usize) -> Vec<f32> {
    let (natural, format) = (layer.experts(), Format::of::<f32>().unwrap());
    let sizes = [format.shape(FEATURES, 2, HIDDEN), format.shape(HIDDEN, 1, FEATURES)];
    let sizes = sizes.map(|shape| shape.iter().product::<usize>());
    // Packing overwrites everything, padding too.
    let mut panels = sizes.map(|size| vec![f32::NAN; EXPERTS * size]);
    let [gate_up, down] = &mut panels;
    prepack(
        &natural,
        gate_up.chunks_exact_mut(sizes[0]).collect(),
        down.chunks_exact_mut(sizes[1]).collect(),
    )
    .unwrap();
    assert!(panels.iter().flatten().all(|value| value.is_finite()));
    let tensors = Tensors {
        gate_up: panels[0].chunks_exact(sizes[0]).map(|w| (w, [2 * FEATURES, HIDDEN])).collect(),
        down: panels[1].chunks_exact(sizes[1]).map(|w| (w, [HIDDEN, FEATURES])).collect(),
        up: Vec::new(),
        gate_up_bias: Vec::new(),
        up_bias: Vec::new(),
        down_bias: Vec::new(),
    };
    let experts =
        Experts::packed("experts", tensors, Packing::Halves, natural.activation, format).unwrap();
    let mut out = vec![f32::NAN; tokens * HIDDEN];
    let call = Call {
        x: &layer.x[..tokens * HIDDEN],
        tokens,
        topk_ids: Ids::I32(&layer.ids[..tokens * TOP_K]),
        topk_weights: TopkWeights::Float(&layer.topk_weights[..tokens * TOP_K]),
        ..layer.call()
    };
    forward(&call, &experts, &mut out, Extras::default()).unwrap();
    out
}

#[test]
fn packed_weights_give_the_same_layer_and_bits_that_know_no_company() {
    let layer = Layer::new();
    let all = packed_forward(&layer, TOKENS);
    for (packed, natural) in all.iter().zip(layer.forward()) {
        assert!((packed - natural).abs() < 1e-3, "{packed} is not {natural}");
    }
    for tokens in [1, 2, 3, 7, 20] {
        assert_eq!(bits(&packed_forward(&layer, tokens)), bits(&all[..tokens * HIDDEN]));
    }
}

#[test]
fn an_id_that_is_no_expert_is_told_with_its_slot() {
    let mut layer = Layer::new();
    layer.ids[7] = 5;
    let mut out = vec![0.0; TOKENS * HIDDEN];
    let error = forward(&layer.call(), &layer.experts(), &mut out, Extras::default()).unwrap_err();
    assert_eq!(error.to_string(), "experts: topk_ids must lie in -1..4, got 5 at slot 7");
}

#[test]
fn sums_over_nothing_are_the_bias() {
    let mut out = [f32::NAN; 6];
    let weights = [(&[][..], [2, 0])];
    grouped_matmul(&[], [3, 0], &weights, &[&[1.0, 2.0]], false, &[0, 2], 2, &mut out).unwrap();
    assert_eq!(out, [1.0, 2.0, 1.0, 2.0, 0.0, 0.0]);
}
