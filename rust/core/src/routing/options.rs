//! What a router may be asked for, and which combinations make sense.

use super::real::FEW;
use crate::error::{Error, Result};

/// How a logit becomes a score.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum Score {
    Softmax,
    Sigmoid,
    SqrtSoftplus,
    Identity,
}

/// What the choice of experts happens on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TopkOn {
    /// Scores first, of all experts.
    Score,
    /// Scores last, of the chosen experts.
    Logits,
}

/// What a group of experts is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupScore {
    /// Sum of its two best.
    Top2Sum,
    /// Its best.
    Max,
    /// Sum of its `top_k / topk_groups` best.
    TopkOverGroups,
}

/// How the K weights of a token are brought to a common size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Renorm {
    /// Not at all.
    None,
    /// w / (Σw + eps)
    Sum,
    /// w / max(Σw, eps)
    Clamp,
    /// w / K
    MeanK,
    /// Softmax of ln(sigmoid): w / Σw of sigmoid scores, at any magnitude.
    Log,
    /// w divided by its p-norm.
    Norm(f64),
}

/// Arguments of a router, but for its tensors.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs, reason = "each is an argument of route()")]
pub struct Options {
    pub top_k: usize,
    pub score: Score,
    pub topk_on: TopkOn,
    pub num_groups: usize,
    pub topk_groups: usize,
    pub group_score: GroupScore,
    pub group_fill: f64,
    pub renorm: Renorm,
    pub eps: f64,
    pub scale: f64,
    pub logit_scale: f64,
    pub softcap: Option<f64>,
    pub num_shared: usize,
}

const OP: &str = "route";

fn pick<T: Copy>(arg: &'static str, name: &str, names: &[(&str, T)]) -> Result<T> {
    if let Some((_, value)) = names.iter().find(|(known, _)| *known == name) {
        return Ok(*value);
    }
    let known: Vec<_> = names.iter().map(|(known, _)| *known).collect();
    let expected = format!("be one of {}", known.join(", "));
    Err(Error::Value { op: OP, arg, expected, got: format!("'{name}'") })
}

impl Score {
    /// By the name Python uses.
    pub fn of(name: &str) -> Result<Self> {
        let names = [
            ("softmax", Self::Softmax),
            ("sigmoid", Self::Sigmoid),
            ("sqrtsoftplus", Self::SqrtSoftplus),
            ("identity", Self::Identity),
        ];
        pick("score", name, &names)
    }
}

impl TopkOn {
    /// By the name Python uses.
    pub fn of(name: &str) -> Result<Self> {
        pick("topk_on", name, &[("score", Self::Score), ("logits", Self::Logits)])
    }
}

impl GroupScore {
    /// By the name Python uses.
    pub fn of(name: &str) -> Result<Self> {
        let names = [
            ("top2_sum", Self::Top2Sum),
            ("max", Self::Max),
            ("topk_over_groups", Self::TopkOverGroups),
        ];
        pick("group_score", name, &names)
    }
}

impl Renorm {
    /// By the name Python uses, or as the p of a norm.
    pub fn of(name: Option<&str>, p: f64) -> Result<Self> {
        let Some(name) = name else { return Ok(Self::None) };
        let names = [
            ("sum", Self::Sum),
            ("clamp", Self::Clamp),
            ("mean_k", Self::MeanK),
            ("log", Self::Log),
            ("a number", Self::Norm(p)),
        ];
        pick("renorm", name, &names)
    }
}

impl Options {
    /// Slots of a token: the chosen experts, and those that every token uses.
    pub fn slots(&self) -> usize {
        self.top_k + self.num_shared
    }

    /// Fails if the options contradict each other or the number of logits.
    pub fn check(&self, logits: usize) -> Result<()> {
        let fail =
            |arg, expected: String, got: String| Err(Error::Value { op: OP, arg, expected, got });
        let Self { top_k, num_groups, topk_groups, num_shared, .. } = *self;
        let Some(num_experts) = logits.checked_sub(num_shared) else {
            let expected = format!("lie in 0..{logits}, the number of logits");
            return fail("num_shared", expected, num_shared.to_string());
        };
        if top_k > num_experts {
            let expected = format!("lie in 0..{num_experts}, the number of experts");
            return fail("top_k", expected, top_k.to_string());
        }
        if num_groups == 0 || !num_experts.is_multiple_of(num_groups) {
            let expected = format!("divide the {num_experts} experts");
            return fail("num_groups", expected, num_groups.to_string());
        }
        if topk_groups == 0 || topk_groups > num_groups {
            let expected = format!("lie in 1..{num_groups}, the number of groups");
            return fail("topk_groups", expected, topk_groups.to_string());
        }
        if self.grouped() {
            let live = topk_groups * (num_experts / num_groups);
            if top_k > live && self.group_fill == f64::NEG_INFINITY {
                let expected =
                    format!("be at most {live}, the experts in topk_groups {topk_groups}");
                return fail("top_k", expected, top_k.to_string());
            }
            if topk_groups > top_k && self.group_score == GroupScore::TopkOverGroups {
                let expected = format!("be at most top_k ({top_k}) with 'topk_over_groups'");
                return fail("topk_groups", expected, topk_groups.to_string());
            }
            if self.group_fill.is_nan() {
                return fail("group_fill", "be a number".into(), "nan".into());
            }
        }
        match self.renorm {
            Renorm::Norm(p) if !(p > 0.0 && p.is_finite()) => {
                return fail("renorm", "be a finite p above 0".into(), p.to_string());
            }
            Renorm::Log if self.score != Score::Sigmoid => {
                let got = format!("score '{:?}'", self.score).to_lowercase();
                return fail("renorm", "have score 'sigmoid' to be 'log'".into(), got);
            }
            _ => {}
        }
        if !(self.eps >= 0.0 && self.eps.is_finite()) {
            return fail("eps", "be finite and at least 0".into(), self.eps.to_string());
        }
        if !self.scale.is_finite() {
            return fail("scale", "be finite".into(), self.scale.to_string());
        }
        if let Some(cap) = self.softcap.filter(|cap| !(*cap > 0.0 && cap.is_finite())) {
            return fail("softcap", "be finite and above 0".into(), cap.to_string());
        }
        if !self.logit_scale.is_finite() {
            return fail("logit_scale", "be finite".into(), self.logit_scale.to_string());
        }
        Ok(())
    }

    /// Whether some groups drop out. Keeping all of them is having none.
    pub fn grouped(&self) -> bool {
        self.topk_groups < self.num_groups
    }

    /// Whether the choice needs scores rather than logits.
    ///
    /// Scores are monotone in the logits, so without a bias or sums the logits give the same
    /// choice, exactly and on every device, and only K scores have to be computed.
    pub(super) fn ranks_scores(&self, biased: bool) -> bool {
        let max_of_live =
            self.group_score == GroupScore::Max && self.group_fill == f64::NEG_INFINITY;
        self.topk_on == TopkOn::Score
            && self.score != Score::Identity
            && (biased || (self.grouped() && !max_of_live))
    }

    /// Whether softmax may run over the chosen experts alone.
    ///
    /// Normalising a softmax by its own sum is the softmax of what is left. With a bias the chosen
    /// ones may all have underflowed, and a NaN may stand outside of them; then all are needed.
    pub(super) fn softmax_of_chosen(&self, biased: bool) -> bool {
        self.topk_on == TopkOn::Logits
            || (self.renorm == Renorm::Sum && self.eps == 0.0 && !self.ranks_scores(biased))
    }

    /// Whether the weights need no renormalising, being a softmax of nothing else.
    pub(super) fn sums_to_one(&self, softmax_of_chosen: bool) -> bool {
        softmax_of_chosen
            && self.score == Score::Softmax
            && self.renorm == Renorm::Sum
            && self.eps == 0.0
    }

    /// Whether the weights are a softmax of no more experts than [`FEW`], scaled.
    pub(super) fn is_softmax_of_few(&self, softmax_of_chosen: bool) -> bool {
        let as_it_is = self.sums_to_one(softmax_of_chosen) || self.renorm == Renorm::None;
        softmax_of_chosen && self.score == Score::Softmax && as_it_is && self.slots() <= FEW
    }

    /// How many of a group's best are summed to its value.
    pub(super) fn summed(&self) -> usize {
        match self.group_score {
            GroupScore::Top2Sum => 2,
            GroupScore::Max => 1,
            GroupScore::TopkOverGroups => self.top_k / self.topk_groups,
        }
    }
}
