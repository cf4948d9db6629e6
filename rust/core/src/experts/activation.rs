//! What stands between an expert's two products, on the accumulators.
//!
//! Written once as plain loops; each instruction-set file compiles them for its own registers.

use crate::Element;
use crate::dtype::Accumulator;

/// The functions an expert may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum Function {
    Silu,
    Gelu,
    GeluTanh,
    Relu,
    Relu2,
    /// GPT-OSS: `(u + 1) · g · σ(alpha · g)`.
    Oss,
}

/// A function with its clamp: `act(min(g, limit)) · clamp(u, ±limit)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Activation {
    /// Of the gate.
    pub function: Function,
    /// Infinite where nothing is clamped.
    pub limit: f64,
    /// Of [`Function::Oss`].
    pub alpha: f64,
}

/// An accumulator with the functions that activations need.
pub trait Math: Accumulator {
    /// `e^self`, saturating below infinity in `f32`.
    #[must_use]
    fn exponential(self) -> Self;
    /// The error function.
    #[must_use]
    fn error_function(self) -> Self;
    /// Probability of a normal variable below `self`, in its lower tail too: `1 + erf` would cancel.
    #[must_use]
    fn normal_cdf(self) -> Self;
}

impl Math for f32 {
    // Cephes' range reduction and polynomial. No call, no branch, no float-to-integer cast, so
    // that loops over it become vector code; NaN stays NaN. Worst error 2 units in the last place.
    #[inline(always)]
    fn exponential(self) -> Self {
        const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
        let x = if self > 88.3 { 88.3 } else { self };
        let x = if x < -87.3 { -87.3 } else { x };
        let shifted = x * std::f32::consts::LOG2_E + ROUND;
        let n = shifted - ROUND;
        let r = x - n * 0.693_359_4;
        let r = r - n * -2.121_944_4e-4;
        let p = ((((1.987_569_1e-4 * r + 1.398_199_9e-3) * r + 8.333_452e-3) * r + 4.166_579_6e-2)
            * r
            + 0.166_666_65)
            * r
            + 0.5;
        let p = p * (r * r) + r + 1.0;
        let power = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_shl(23);
        f32::from_bits(p.to_bits().wrapping_add(power))
    }

    #[inline(always)]
    fn error_function(self) -> Self {
        let (near, tail) = erf_and_tail(self);
        // `>` is false for NaN, which copysign would lose; `near` keeps it.
        if self.abs() > FAR { (1.0 - tail).copysign(self) } else { near }
    }

    #[inline(always)]
    fn normal_cdf(self) -> Self {
        let z = self * std::f32::consts::FRAC_1_SQRT_2;
        let (near, tail) = erf_and_tail(z);
        let far = if z < 0.0 { 0.5 * tail } else { 1.0 - 0.5 * tail };
        if z.abs() > FAR { far } else { 0.5 * (1.0 + near) }
    }
}

/// Where [`erf_and_tail`] changes from one polynomial to the other.
const FAR: f32 = 0.927_734_4;

/// `erf(x)`, good up to [`FAR`], and `erfc(|x|)`, good beyond: both are computed, so that loops over
/// it become vector code. Worst error 2 units in the last place.
#[inline(always)]
fn erf_and_tail(x: f32) -> (f32, f32) {
    let (t, s) = (x.abs(), x * x);
    let near = ((((-5.967_617e-4 * s + 4.991_194e-3) * s - 2.676_813_5e-2) * s + 1.128_199_3e-1)
        * s
        - 3.761_253_4e-1)
        * s
        + 1.283_791_7e-1;
    let u = -3.883_964_4e-3 * t + 2.425_462_2e-2;
    let r = (-1.728_534_7e-5 * t + 3.831_98e-4) * s + u;
    let r = (r * t - 1.067_778_8e-1) * t - 6.348_468_7e-1;
    let r = (r * t - 1.287_175_1e-1) * t - t;
    (near * x + x, r.exponential())
}

impl Math for f64 {
    #[inline(always)]
    fn exponential(self) -> Self {
        f64::exp(self)
    }

    // The series of positive terms, 2/√π · e^(−x²) · Σ 2ⁿ x^(2n+1) / (2n+1)!!: nothing cancels.
    // Beyond 6, erf is 1 to the last bit.
    fn error_function(self) -> Self {
        if self.abs() > 6.0 {
            return 1f64.copysign(self);
        }
        let (mut term, mut sum, mut n) = (self, self, 0.0);
        while term.abs() > sum.abs() * 1e-17 {
            n += 1.0;
            term *= 2.0 * self * self / (2.0 * n + 1.0);
            sum += term;
        }
        std::f64::consts::FRAC_2_SQRT_PI * (-self * self).exp() * sum
    }

    fn normal_cdf(self) -> Self {
        0.5 * (1.0 + (self * std::f64::consts::FRAC_1_SQRT_2).error_function())
    }
}

#[inline(always)]
fn constant<F: Accumulator>(value: f64) -> F {
    F::from_f64(value)
}

#[inline(always)]
fn sigmoid<F: Math>(x: F) -> F {
    constant::<F>(1.0) / (constant::<F>(1.0) + (-x).exponential())
}

/// √(2/π), and the cubic coefficient of the tanh form.
const TANH: (f64, f64) = (0.797_884_560_802_865_4, 0.044_715);

/// `act(g)` and its derivative; `alpha` is [`Function::Oss`]'s.
#[inline(always)]
fn gated<F: Math>(function: Function, alpha: F, g: F) -> (F, F) {
    let (zero, one) = (F::default(), constant::<F>(1.0));
    match function {
        Function::Silu | Function::Oss => {
            let a = if function == Function::Silu { one } else { alpha };
            let s = sigmoid(a * g);
            (g * s, s + a * g * s * (one - s))
        }
        Function::Gelu => {
            let cdf = g.normal_cdf();
            let pdf = constant::<F>(TANH.0 / 2.0) * (constant::<F>(-0.5) * g * g).exponential();
            (g * cdf, cdf + g * pdf)
        }
        // 0.5 · (1 + tanh z) is σ(2z).
        Function::GeluTanh => {
            let (c, cubic) = (constant::<F>(2.0 * TANH.0), constant::<F>(TANH.1));
            let s = sigmoid(c * (g + cubic * g * g * g));
            let slope = c * (one + constant::<F>(3.0) * cubic * g * g);
            (g * s, s + g * s * (one - s) * slope)
        }
        // Comparisons that are false for NaN keep it.
        Function::Relu => {
            if g <= zero {
                (zero, zero)
            } else {
                (g, one)
            }
        }
        Function::Relu2 => {
            let r = if g <= zero { zero } else { g };
            (r * r, constant::<F>(2.0) * r)
        }
    }
}

#[inline(always)]
fn at_most<F: Accumulator>(x: F, limit: F) -> F {
    if x > limit { limit } else { x }
}

#[inline(always)]
fn clamp<F: Accumulator>(x: F, limit: F) -> F {
    if x < -limit { -limit } else { at_most(x, limit) }
}

/// Runs `$body` once per function, with `$function` a constant in each, so that the loops inside
/// hold no choice.
macro_rules! specialise {
    ($value:expr, $function:ident, $body:expr) => {{
        macro_rules! with {
            ($variant:ident) => {{
                const $function: Function = Function::$variant;
                $body
            }};
        }
        match $value {
            Function::Silu => with!(Silu),
            Function::Gelu => with!(Gelu),
            Function::GeluTanh => with!(GeluTanh),
            Function::Relu => with!(Relu),
            Function::Relu2 => with!(Relu2),
            Function::Oss => with!(Oss),
        }
    }};
}

/// `out = act(gate) · up`, or `act(gate)` where `up` is empty.
#[inline(always)]
pub(super) fn apply<A: Element>(
    activation: &Activation,
    gate: &[A::Acc],
    up: &[A::Acc],
    out: &mut [A],
) where
    A::Acc: Math,
{
    let (limit, alpha) = (constant(activation.limit), constant(activation.alpha));
    specialise!(activation.function, FUNCTION, {
        if up.is_empty() {
            for (out, &g) in out.iter_mut().zip(gate) {
                *out = A::round(gated(FUNCTION, alpha, at_most(g, limit)).0);
            }
        } else {
            let shift = constant(if FUNCTION == Function::Oss { 1.0 } else { 0.0 });
            for ((out, &g), &u) in out.iter_mut().zip(gate).zip(up) {
                let u = clamp(u, limit) + shift;
                *out = A::round(gated(FUNCTION, alpha, at_most(g, limit)).0 * u);
            }
        }
    });
}

/// Turns `gate` and `up` into their gradients for the gradient `d` of the activation's result, and
/// writes that result to `value`.
#[inline(always)]
pub(super) fn gradient<F: Math>(
    activation: &Activation,
    gate: &mut [F],
    up: &mut [F],
    d: &[F],
    value: &mut [F],
) {
    let (limit, alpha) = (constant(activation.limit), constant(activation.alpha));
    let zero = F::default();
    specialise!(activation.function, FUNCTION, {
        if up.is_empty() {
            for ((g, &d), out) in gate.iter_mut().zip(d).zip(value) {
                let (value, slope) = gated(FUNCTION, alpha, at_most(*g, limit));
                *g = if *g > limit { zero } else { slope * d };
                *out = value;
            }
        } else {
            let shift = constant(if FUNCTION == Function::Oss { 1.0 } else { 0.0 });
            for (((g, u), &d), out) in gate.iter_mut().zip(up).zip(d).zip(value) {
                let (value, slope) = gated(FUNCTION, alpha, at_most(*g, limit));
                let (clamped, inside) = (clamp(*u, limit), !(*u > limit || *u < -limit));
                let factor = clamped + shift;
                *g = if *g > limit { zero } else { slope * d * factor };
                *u = if inside { value * d } else { zero };
                *out = value * factor;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Function; 6] = [
        Function::Silu,
        Function::Gelu,
        Function::GeluTanh,
        Function::Relu,
        Function::Relu2,
        Function::Oss,
    ];

    #[test]
    fn exp_and_erf_are_right_to_a_few_units_in_the_last_place() {
        for i in -8700..8800 {
            let x = i as f32 / 100.0;
            let (got, want) = (f64::from(x.exponential()), f64::from(x).exp());
            assert!((got - want).abs() <= want * 3e-7, "exp({x}) = {got}, not {want}");
            let x = x / 20.0;
            let (got, want) = (f64::from(x.error_function()), f64::from(x).error_function());
            assert!((got - want).abs() <= want.abs() * 3e-7, "erf({x}) = {got}, not {want}");
        }
        // Published values.
        for (x, want) in [(0.5f64, 0.520_499_877_813_046_5), (2.0, 0.995_322_265_018_952_7)] {
            assert!((x.error_function() - want).abs() < 1e-15);
            assert!(((-x).error_function() + want).abs() < 1e-15);
        }
    }

    #[test]
    fn gradients_are_the_slopes_of_the_function() {
        let step = 1e-6;
        for function in ALL {
            let activation = Activation { function, limit: 2.0, alpha: 1.702 };
            for (g, u) in [(0.7f64, 1.3), (-1.1, -0.4), (2.5, 0.3), (-3.0, 2.5), (0.9, -2.5)] {
                let value = |g: f64, u: f64| {
                    let mut out = [0f64];
                    apply(&activation, &[g], &[u], &mut out);
                    out[0]
                };
                let (mut dg, mut du, mut out) = ([g], [u], [0f64]);
                gradient(&activation, &mut dg, &mut du, &[0.5], &mut out);
                let slope_g = (value(g + step, u) - value(g - step, u)) / (2.0 * step);
                let slope_u = (value(g, u + step) - value(g, u - step)) / (2.0 * step);
                assert!((dg[0] - 0.5 * slope_g).abs() < 1e-8, "{function:?} gate at {g}, {u}");
                assert!((du[0] - 0.5 * slope_u).abs() < 1e-8, "{function:?} up at {g}, {u}");
                assert!((out[0] - value(g, u)).abs() < 1e-15);
            }
        }
    }

    #[test]
    fn not_a_number_stays_not_a_number() {
        for function in ALL {
            let activation = Activation { function, limit: 7.0, alpha: 1.702 };
            let mut out = [0f32; 2];
            apply(&activation, &[f32::NAN, 1.0], &[1.0, f32::NAN], &mut out);
            assert!(out[0].is_nan() && out[1].is_nan(), "{function:?}");
        }
    }
}
