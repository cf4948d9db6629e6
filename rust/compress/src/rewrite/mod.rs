//! Writing a new checkpoint folder from an old one, tensor by tensor.
//!
//! Everything is checked and every size known before a byte is written. Shards go to temporary
//! names, are synced, and take their names when they are whole; the index comes after them and
//! config.json after that, so a folder without config.json is an unfinished one. A run that was
//! stopped, at any moment, goes on with the first shard it had not finished.

mod shard;

use crate::checkpoint::{Checkpoint, Dtype, Source, Tensor};
use crate::error::{Error, Result};
use crate::job::Job;
use crate::merge::{Merger, mean};
use crate::recipe::{Op, Output, Recipe};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use shard::{ShardWriter, replace};
use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

const OP: &str = "rewrite";
const PROGRESS: &str = "progress.jsonl";
const CONFIG: &str = "config.json";

/// One output tensor, with everything known but its bytes.
#[derive(Debug)]
pub struct Planned {
    /// Its name.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its extents.
    pub shape: Vec<usize>,
}

impl Planned {
    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.dtype.bytes(&self.shape).expect("checked when it was planned")
    }
}

/// A finished shard, as the progress file records it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Finished {
    recipe: String,
    /// File name.
    pub shard: String,
    /// Size of the file.
    pub bytes: u64,
    /// Of the whole file, in hexadecimal.
    pub sha256: String,
}

/// What a rewrite did.
#[derive(Debug)]
pub struct Report {
    /// In order of their numbers.
    pub shards: Vec<Finished>,
    /// How many of them an earlier run had finished.
    pub resumed: usize,
}

/// A checked rewrite.
#[derive(Debug)]
pub struct Rewrite {
    source: Source,
    recipe: Recipe,
    hash: String,
    /// In output order.
    pub tensors: Vec<Planned>,
    /// First tensor of each shard, and one past the last tensor.
    bounds: Vec<usize>,
}

impl Rewrite {
    /// Opens the source and checks the recipe against it; writes nothing.
    pub fn plan(source: &Path, recipe: &str, max_shard_bytes: u64) -> Result<Self> {
        let mut hasher = Sha256::new();
        hasher.update(max_shard_bytes.to_le_bytes());
        hasher.update(recipe);
        let recipe = Recipe::parse(recipe)?;
        let source = Source::open(Checkpoint::open(source)?)?;
        // A source that changed since must not be mixed with what was written before.
        for shard in &source.checkpoint.shards {
            hasher.update(format!("{} {}", shard.name, shard.bytes));
        }
        for file in &recipe.files {
            let path = source.checkpoint.folder.join(file);
            fs::metadata(&path).map_err(Error::io(OP, &path, "read"))?;
        }
        let merger = Merger::new(&source, &recipe.layers);
        let mut names = HashSet::new();
        let mut tensors = Vec::with_capacity(recipe.tensors.len());
        for output in &recipe.tensors {
            if !names.insert(&output.name) {
                return Err(Error::value(OP, "tensors", "name each tensor once", &output.name));
            }
            tensors.push(planned(&source, &merger, output)?);
        }
        let bounds = shard_bounds(&tensors, max_shard_bytes);
        Ok(Self { source, hash: hexadecimal(&hasher.finalize()), recipe, tensors, bounds })
    }

    /// Bytes of all output tensors.
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(Planned::bytes).sum()
    }

    /// File name and tensors of each shard.
    pub fn shards(&self) -> impl Iterator<Item = (String, &[Planned])> {
        let count = self.bounds.len() - 1;
        self.bounds.windows(2).enumerate().map(move |(number, bounds)| {
            let name = match count {
                1 => "model.safetensors".into(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
            };
            (name, &self.tensors[bounds[0]..bounds[1]])
        })
    }

    /// Writes the new folder, or goes on where a run of the same recipe was stopped.
    pub fn run(&self, target: &Path, job: &Job) -> Result<Report> {
        let finished = self.open_target(target)?;
        job.start(self.bytes());
        let mut merger = Merger::new(&self.source, &self.recipe.layers);
        let mut report = Report { shards: Vec::new(), resumed: 0 };
        let mut first = 0;
        for (name, tensors) in self.shards() {
            let outputs = &self.recipe.tensors[first..first + tensors.len()];
            first += tensors.len();
            if let Some(done) = finished.iter().find(|done| done.shard == name) {
                job.advance(tensors.iter().map(Planned::bytes).sum());
                report.shards.push(done.clone());
                report.resumed += 1;
                continue;
            }
            let mut writer = ShardWriter::create(target, &name, tensors)?;
            for (output, tensor) in outputs.iter().zip(tensors) {
                job.doing(&tensor.name);
                self.write(output, &mut merger, &mut writer, job)?;
            }
            let (bytes, sha256) = writer.finish()?;
            let done = Finished { recipe: self.hash.clone(), shard: name, bytes, sha256 };
            record(target, &done)?;
            report.shards.push(done);
        }
        self.finish(target, job)?;
        Ok(report)
    }

    /// Makes the folder or checks that it is ours, and returns the shards that are done.
    fn open_target(&self, target: &Path) -> Result<Vec<Finished>> {
        let folder = &self.source.checkpoint.folder;
        if let (Ok(a), Ok(b)) = (fs::canonicalize(target), fs::canonicalize(folder))
            && a == b
        {
            let got = target.display().to_string();
            return Err(Error::value(OP, "output", "be another folder than the source", got));
        }
        fs::create_dir_all(target).map_err(Error::io(OP, target, "made"))?;
        let mut finished = Vec::new();
        let progress = target.join(PROGRESS);
        if progress.exists() {
            let text = fs::read_to_string(&progress).map_err(Error::io(OP, &progress, "read"))?;
            // The last line may be half-written; the shard it speaks of is then written again.
            finished = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
        }
        let ours = |done: &Finished| done.recipe == self.hash;
        let mut names = Vec::new();
        for entry in fs::read_dir(target).map_err(Error::io(OP, target, "listed"))? {
            let entry = entry.map_err(Error::io(OP, target, "listed"))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.contains(".tmp-") {
                let path = entry.path();
                fs::remove_file(&path).map_err(Error::io(OP, &path, "removed"))?;
            } else {
                names.push(name);
            }
        }
        let our_own = progress.exists() && finished.iter().all(ours);
        if !names.is_empty() && !our_own {
            return Err(Error::Exists {
                op: OP,
                path: target.display().to_string(),
                expected: "be a new or empty folder, or one where this same job was interrupted",
                got: format!("{} files of something else", names.len()),
            });
        }
        finished.retain(|done| {
            fs::metadata(target.join(&done.shard)).is_ok_and(|file| file.len() == done.bytes)
        });
        let written: u64 = finished.iter().map(|done| done.bytes).sum();
        let needed = self.bytes().saturating_sub(written);
        let space = rustix::fs::statvfs(target)
            .map_err(|error| Error::io(OP, target, "asked for its free space")(error.into()))?;
        let free = space.f_bavail * space.f_frsize;
        if needed > free {
            return Err(Error::NoSpace {
                op: OP,
                path: target.display().to_string(),
                needed,
                free,
            });
        }
        if !progress.exists() {
            replace(target, PROGRESS, b"")?;
        }
        Ok(finished)
    }

    fn write(
        &self,
        output: &Output,
        merger: &mut Merger<'_>,
        writer: &mut ShardWriter,
        job: &Job,
    ) -> Result<()> {
        match &output.op {
            Op::Copy { from } => {
                let tensor = self.source.tensor(from)?;
                writer.copy(&self.source, tensor, 0, tensor.bytes(), job)
            }
            Op::Select { from, axis, indices } => {
                let tensor = self.source.tensor(from)?;
                let extent = tensor.shape[*axis] as u64;
                let outer: usize = tensor.shape[..*axis].iter().product();
                let slice = tensor.bytes() / (outer as u64 * extent).max(1);
                for block in 0..outer as u64 {
                    for &index in indices {
                        let offset = (block * extent + index as u64) * slice;
                        writer.copy(&self.source, tensor, offset, slice, job)?;
                    }
                }
                Ok(())
            }
            Op::Mean { from, axis, groups } => {
                let tensor = self.source.tensor(from)?;
                writer.put(&mean(&self.source, tensor, *axis, groups)?, job)
            }
            Op::Merge { layer, part, groups } => {
                for &group in groups {
                    job.check()?;
                    writer.put(&merger.merged(*layer, part, group)?, job)?;
                }
                Ok(())
            }
        }
    }

    /// Index, other files, config, in this order.
    fn finish(&self, target: &Path, job: &Job) -> Result<()> {
        job.check()?;
        if self.bounds.len() > 2 {
            let mut map = BTreeMap::new();
            for (shard, tensors) in self.shards() {
                for tensor in tensors {
                    map.insert(tensor.name.as_str(), shard.clone());
                }
            }
            let total = self.bytes();
            let index = serde_json::json!({"metadata": {"total_size": total}, "weight_map": map});
            let text = serde_json::to_string_pretty(&index).expect("maps of strings are JSON");
            replace(target, crate::checkpoint::reader::INDEX, format!("{text}\n").as_bytes())?;
        }
        for file in &self.recipe.files {
            let path = self.source.checkpoint.folder.join(file);
            let bytes = fs::read(&path).map_err(Error::io(OP, &path, "read"))?;
            replace(target, file, &bytes)?;
        }
        replace(target, CONFIG, self.recipe.config.as_bytes())?;
        let progress = target.join(PROGRESS);
        fs::remove_file(&progress).map_err(Error::io(OP, &progress, "removed"))
    }
}

/// Checks one output against the source.
fn planned(source: &Source, merger: &Merger<'_>, output: &Output) -> Result<Planned> {
    let along = |tensor: &Tensor, axis: usize, indices: &[usize], n: usize| {
        let Some(&extent) = tensor.shape.get(axis) else {
            let what = format!("axis of {}", output.name);
            let expected = format!("be below {}", tensor.shape.len());
            return Err(Error::value(OP, what, expected, axis.to_string()));
        };
        if let Some(wrong) = indices.iter().find(|&&index| index >= extent) {
            let what = format!("indices of {}", output.name);
            return Err(Error::value(OP, what, format!("be below {extent}"), wrong.to_string()));
        }
        let mut shape = tensor.shape.clone();
        shape[axis] = n;
        Ok(shape)
    };
    let (dtype, shape) = match &output.op {
        Op::Copy { from } => {
            let tensor = source.tensor(from)?;
            (tensor.dtype, tensor.shape.clone())
        }
        Op::Select { from, axis, indices } => {
            let tensor = source.tensor(from)?;
            let shape = along(tensor, *axis, indices, indices.len())?;
            (tensor.dtype, shape)
        }
        Op::Mean { from, axis, groups } => {
            let tensor = source.tensor(from)?;
            let members: Vec<_> = groups.iter().flat_map(|g| g.members.iter().copied()).collect();
            (tensor.dtype, along(tensor, *axis, &members, groups.len())?)
        }
        Op::Merge { layer, part, groups } => {
            let (tensor, mut shape, per_expert) = merger.part(*layer, part)?;
            if !per_expert {
                shape.insert(0, groups.len());
            } else if groups.len() != 1 {
                let what = format!("groups of {}", output.name);
                return Err(Error::value(OP, what, "be one", groups.len().to_string()));
            }
            (tensor.dtype, shape)
        }
    };
    let tensor = Planned { name: output.name.clone(), dtype, shape };
    if tensor.dtype.bytes(&tensor.shape).is_none() {
        let what = format!("shape of {}", output.name);
        return Err(Error::value(OP, what, "be whole bytes", format!("{:?}", tensor.shape)));
    }
    Ok(tensor)
}

/// Fills shards in order; a tensor larger than the limit gets one of its own.
fn shard_bounds(tensors: &[Planned], max_shard_bytes: u64) -> Vec<usize> {
    let (mut bounds, mut filled) = (vec![0], 0);
    for (number, tensor) in tensors.iter().enumerate() {
        if filled > 0 && filled + tensor.bytes() > max_shard_bytes {
            bounds.push(number);
            filled = 0;
        }
        filled += tensor.bytes();
    }
    bounds.push(tensors.len());
    bounds
}

fn record(target: &Path, done: &Finished) -> Result<()> {
    let path: PathBuf = target.join(PROGRESS);
    let line = serde_json::to_string(done).expect("strings and a number are JSON");
    let mut file = fs::OpenOptions::new().append(true).open(&path);
    file.as_mut()
        .map_err(|error| std::io::Error::from(error.kind()))
        .and_then(|file| {
            writeln!(file, "{line}")?;
            file.sync_data()
        })
        .map_err(Error::io(OP, &path, "written"))
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // Writing to a String cannot fail.
        text
    })
}
