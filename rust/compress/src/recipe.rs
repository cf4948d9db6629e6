//! What a rewrite makes: every output tensor once, by one operation each.
//!
//! Python writes a recipe from a plan and a family's layout; this is the one place that reads it.

use crate::error::{Error, Result};
use serde::Deserialize;
use std::collections::BTreeMap;

const OP: &str = "rewrite";

/// The whole recipe.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    format: String,
    version: u32,
    /// Text of the new config.json.
    pub config: String,
    /// Other files to copy from the source folder, by name.
    pub files: Vec<String>,
    /// Where the experts of each merged layer lie, and which belong together.
    pub layers: Vec<Layer>,
    /// In output order.
    pub tensors: Vec<Output>,
}

/// How gate and up share tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Packing {
    /// `gate`, `up`, `down`.
    Separate,
    /// `gate_up` with gate rows first, `down`.
    Halves,
    /// `gate_up` with gate and up rows in turn, `down`.
    Interleaved,
    /// `up`, `down`.
    Ungated,
}

impl Packing {
    /// The parts that hold its neurons: those it must have, and those it may have beside them.
    const fn parts(self) -> (&'static [&'static str], &'static [&'static str]) {
        match self {
            Self::Separate => (&["gate", "up", "down"], &["gate_bias", "up_bias", "down_bias"]),
            Self::Halves | Self::Interleaved => {
                (&["gate_up", "down"], &["gate_up_bias", "down_bias"])
            }
            Self::Ungated => (&["up", "down"], &["up_bias", "down_bias"]),
        }
    }
}

/// How members of a group are matched to its reference before they are averaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Align {
    /// Not at all.
    None,
    /// By the best permutation of neurons.
    Perm,
    /// By the best permutation and sign of each neuron's linear branch.
    PermSign,
}

/// The experts of one layer.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// For messages.
    pub name: String,
    /// How gate and up lie.
    pub packing: Packing,
    /// Matrices are stored [in, out].
    pub transposed: bool,
    /// Tensor name of each part; one with `{e}` is a tensor per expert, one without holds all.
    pub tensors: BTreeMap<String, String>,
    /// How members are aligned.
    pub align: Align,
    /// The merged experts.
    pub groups: Vec<Group>,
}

/// Experts that become one.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Expert numbers.
    pub members: Vec<usize>,
    /// One each, not negative; they need not sum to 1.
    pub weights: Vec<f64>,
    /// The member that the others are aligned to.
    #[serde(default)]
    pub reference: Option<usize>,
}

impl Group {
    /// Members that count, with weights that sum to 1: without those of weight 0, or all alike if
    /// every weight is 0.
    pub fn shares(&self) -> Vec<(usize, f64)> {
        let total: f64 = self.weights.iter().sum();
        let members = self.members.iter().zip(&self.weights);
        if total == 0.0 {
            return members.map(|(&m, _)| (m, 1.0 / self.members.len() as f64)).collect();
        }
        members.filter(|(_, w)| **w > 0.0).map(|(&m, &w)| (m, w / total)).collect()
    }

    /// The member that the others are aligned to; the first where none is named.
    pub fn reference(&self) -> usize {
        self.reference.unwrap_or(self.members[0])
    }

    fn check(&self, of: &str) -> Result<()> {
        let wrong = |expected: &str, got: String| Err(Error::value(OP, of, expected, got));
        if self.members.is_empty() {
            return wrong("have members", "none".into());
        }
        let mut once = self.members.clone();
        once.sort_unstable();
        once.dedup();
        if once.len() != self.members.len() {
            return wrong("have each member once", format!("{:?}", self.members));
        }
        if self.weights.len() != self.members.len() {
            return wrong("have a weight for each member", format!("{:?}", self.weights));
        }
        if !self.weights.iter().all(|weight| weight.is_finite() && *weight >= 0.0) {
            return wrong("have finite weights of 0 or more", format!("{:?}", self.weights));
        }
        if !self.members.contains(&self.reference()) {
            return wrong("have a member as reference", format!("{:?}", self.reference));
        }
        Ok(())
    }
}

/// One output tensor.
#[derive(Debug, Deserialize)]
pub struct Output {
    /// Its name.
    pub name: String,
    /// How it is made.
    #[serde(flatten)]
    pub op: Op,
}

/// How an output tensor is made.
#[derive(Debug, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase")]
pub enum Op {
    /// The bytes of another tensor.
    Copy {
        /// Its name in the source.
        from: String,
    },
    /// Some slices of a tensor.
    Select {
        /// Its name in the source.
        from: String,
        /// Along which axis.
        axis: usize,
        /// Which, in output order; they may repeat.
        indices: Vec<usize>,
    },
    /// Weighted means of slices of a tensor.
    Mean {
        /// Its name in the source.
        from: String,
        /// Along which axis.
        axis: usize,
        /// One for each output slice.
        groups: Vec<Group>,
    },
    /// A part of merged experts.
    Merge {
        /// Number of the layer in the recipe.
        layer: usize,
        /// Key of the layer's `tensors`.
        part: String,
        /// Number of the group of each output expert.
        groups: Vec<usize>,
    },
}

impl Recipe {
    /// Reads a recipe and checks what can be checked without the source.
    pub fn parse(text: &str) -> Result<Self> {
        let recipe: Self = serde_json::from_str(text).map_err(|error| {
            Error::value(OP, "recipe", "be a recipe in JSON", error.to_string())
        })?;
        if recipe.format != "ferromoe-recipe" || recipe.version != 1 {
            let got = format!("{} {}", recipe.format, recipe.version);
            return Err(Error::value(OP, "recipe", "be ferromoe-recipe version 1", got));
        }
        for file in &recipe.files {
            if std::path::Path::new(file).file_name() != Some(file.as_ref()) {
                return Err(Error::value(OP, "files", "be plain file names", format!("{file:?}")));
            }
        }
        for layer in &recipe.layers {
            for (number, group) in layer.groups.iter().enumerate() {
                group.check(&format!("group {number} of {}", layer.name))?;
            }
            let (needed, allowed) = layer.packing.parts();
            let has = |part: &&&str| layer.tensors.contains_key(**part);
            let known = |part: &&String| needed.iter().chain(allowed).any(|known| known == part);
            if needed.iter().filter(has).count() != needed.len()
                || !layer.tensors.keys().all(|part| known(&part))
            {
                let what = format!("tensors of {}", layer.name);
                let expected =
                    format!("be {}, and of {} any", needed.join(", "), allowed.join(", "));
                let got = layer.tensors.keys().cloned().collect::<Vec<_>>().join(", ");
                return Err(Error::value(OP, what, expected, got));
            }
            if layer.align == Align::PermSign && layer.packing == Packing::Ungated {
                let what = format!("align of {}", layer.name);
                return Err(Error::value(OP, what, "be perm or none without a gate", "perm-sign"));
            }
        }
        for output in &recipe.tensors {
            match &output.op {
                Op::Mean { groups, .. } => {
                    for (number, group) in groups.iter().enumerate() {
                        group.check(&format!("group {number} of {}", output.name))?;
                    }
                }
                Op::Merge { layer, part, groups } => {
                    let what = format!("layer of {}", output.name);
                    let Some(found) = recipe.layers.get(*layer) else {
                        return Err(Error::value(OP, what, "be in layers", layer.to_string()));
                    };
                    if !found.tensors.contains_key(part) {
                        let what = format!("part of {}", output.name);
                        return Err(Error::value(
                            OP,
                            what,
                            "be in the layer's tensors",
                            part.clone(),
                        ));
                    }
                    if let Some(wrong) = groups.iter().find(|&&g| g >= found.groups.len()) {
                        let what = format!("groups of {}", output.name);
                        let expected = format!("be below {}", found.groups.len());
                        return Err(Error::value(OP, what, expected, wrong.to_string()));
                    }
                }
                Op::Copy { .. } | Op::Select { .. } => {}
            }
        }
        Ok(recipe)
    }
}
