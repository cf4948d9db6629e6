//! Router logits and the experts that are available: what every pass over them reads.

use super::options::Options;
use super::real::{self, Real};
use crate::dtype::{Accumulator, Element};
use crate::error::{Error, Result, check_shape};

/// Logits that pay for waking a second thread, each token counting as [`TOKEN`] more.
const GRAIN: usize = 24 << 10;
/// What choosing and weighing cost beside the pass over a token's logits.
const TOKEN: usize = 128;

/// Router logits: rows of `experts` values, `stride` apart.
#[derive(Debug, Clone, Copy)]
pub struct Logits<'a, T> {
    /// From the first value of the first row to the last of the last.
    pub values: &'a [T],
    /// T.
    pub tokens: usize,
    /// E, with shared experts behind the routed ones.
    pub experts: usize,
    /// Elements from one row to the next; at least E.
    pub stride: usize,
    /// Routed experts that may be chosen.
    pub mask: Option<Mask<'a>>,
}

/// Which of the routed experts may be chosen; 0 is no.
#[derive(Debug, Clone, Copy)]
pub struct Mask<'a> {
    /// `[E]` for all tokens alike, or `[T, E]`.
    pub values: &'a [u8],
    /// Whether every token has a row of its own.
    pub per_token: bool,
}

impl<'a, T> Logits<'a, T> {
    /// Rows that lie behind each other, every expert available.
    pub fn contiguous(values: &'a [T], experts: usize) -> Self {
        let tokens = values.len().checked_div(experts).unwrap_or(0);
        Self { values, tokens, experts, stride: experts, mask: None }
    }

    #[inline(always)]
    pub(super) fn row(&self, token: usize) -> &'a [T] {
        &self.values[token * self.stride..][..self.experts]
    }

    /// The mask's row, one entry per routed expert.
    #[inline(always)]
    pub(super) fn available(&self, token: usize, num_shared: usize) -> Option<&'a [u8]> {
        let routed = self.experts - num_shared;
        self.mask
            .map(|mask| &mask.values[if mask.per_token { token * routed } else { 0 }..][..routed])
    }

    /// Tokens that one thread takes at a time.
    pub(super) fn batch(&self) -> usize {
        GRAIN.div_ceil(self.experts + TOKEN)
    }

    pub(super) fn check(&self, op: &'static str, options: &Options) -> Result<()> {
        options.check(self.experts)?;
        let end = match self.tokens {
            0 => 0,
            tokens => (tokens - 1) * self.stride + self.experts,
        };
        check_shape(op, "router_logits", &[self.values.len()], &[end])?;
        if let Some(mask) = self.mask {
            let rows = if mask.per_token { self.tokens } else { 1 };
            let expected = rows * (self.experts - options.num_shared);
            check_shape(op, "expert_mask", &[mask.values.len()], &[expected])?;
        }
        Ok(())
    }

    /// Fails unless every id is an expert or −1.
    pub(super) fn check_ids(&self, op: &'static str, ids: &[i32]) -> Result<()> {
        let Some(slot) = ids.iter().position(|&id| id < -1 || id >= self.experts as i32) else {
            return Ok(());
        };
        let expected = format!("lie in -1..{}", self.experts as i64 - 1);
        let got = format!("{} at slot {slot}", ids[slot]);
        Err(Error::Value { op, arg: "topk_ids", expected, got })
    }
}

impl<T: Element<Acc: Real>> Logits<'_, T> {
    /// The logits of a token as they are scored: widened, scaled, capped; −∞ where masked.
    #[inline(always)]
    pub(super) fn load(&self, token: usize, options: &Options, z: &mut [T::Acc]) {
        for (z, logit) in z.iter_mut().zip(self.row(token)) {
            *z = logit.widen();
        }
        if options.logit_scale != 1.0 {
            let scale = T::Acc::from_f64(options.logit_scale);
            for z in &mut *z {
                *z = *z * scale;
            }
        }
        if let Some(cap) = options.softcap {
            let cap = T::Acc::from_f64(cap);
            for z in &mut *z {
                *z = cap * real::tanh(*z / cap);
            }
        }
        if let Some(available) = self.available(token, options.num_shared) {
            for (z, &available) in z.iter_mut().zip(available) {
                if available == 0 {
                    *z = T::Acc::LOWEST;
                }
            }
        }
    }

    /// Turns the gradient for what [`Logits::load`] gave, `z`, into the one for the logits.
    #[inline(always)]
    pub(super) fn unload(&self, token: usize, options: &Options, z: &[T::Acc], dz: &mut [T::Acc]) {
        let one = T::Acc::from_f64(1.0);
        if let Some(cap) = options.softcap {
            let cap = T::Acc::from_f64(cap);
            for (dz, &z) in dz.iter_mut().zip(z) {
                let tanh = z / cap;
                *dz = *dz * (one - tanh * tanh);
            }
        }
        if options.logit_scale != 1.0 {
            let scale = T::Acc::from_f64(options.logit_scale);
            for dz in &mut *dz {
                *dz = *dz * scale;
            }
        }
        if let Some(available) = self.available(token, options.num_shared) {
            for (dz, &available) in dz.iter_mut().zip(available) {
                if available == 0 {
                    *dz = T::Acc::default();
                }
            }
        }
    }
}
