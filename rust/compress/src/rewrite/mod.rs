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
use shard::{ShardWriter, TEMPORARY, replace};
use std::collections::{BTreeMap, HashSet};
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

const OP: &str = "rewrite";
const PROGRESS: &str = "progress.jsonl";
const CONFIG: &str = "config.json";
/// Slices of fewer bytes than a page are not worth a read each.
const SMALL: u64 = 4096;

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
        let mut recipe = Recipe::parse(recipe)?;
        let source = Source::open(Checkpoint::open(source)?)?;
        // A source that changed since must not be mixed with what was written before.
        for shard in &source.checkpoint.shards {
            let path = source.checkpoint.folder.join(&shard.name);
            let changed = fs::metadata(&path)
                .and_then(|file| file.modified())
                .map_err(Error::io(OP, &path, "read"))?;
            hasher.update(format!("{} {} {changed:?}", shard.name, shard.bytes));
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
        // Wide elements first in each shard, so that a tensor starts at a multiple of its own.
        let mut pairs: Vec<_> = recipe.tensors.into_iter().zip(tensors).collect();
        for range in bounds.windows(2) {
            pairs[range[0]..range[1]]
                .sort_by_key(|(_, tensor)| std::cmp::Reverse(tensor.dtype.bits()));
        }
        let tensors;
        (recipe.tensors, tensors) = pairs.into_iter().unzip();
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
                let end = writer.bytes() + tensor.bytes();
                self.write(output, &mut merger, &mut writer, job)?;
                assert_eq!(writer.bytes(), end, "{} is not as long as planned", tensor.name);
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
            names.push(name);
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
        // What a killed run left half-written. The folder is ours, so nobody else's is among it.
        for name in names.iter().filter(|name| name.contains(TEMPORARY)) {
            let path = target.join(name);
            fs::remove_file(&path).map_err(Error::io(OP, &path, "removed"))?;
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
                if outer > 1 && slice < SMALL {
                    let slice = slice as usize;
                    return self.select_small(tensor, outer, slice, indices, writer, job);
                }
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
                    writer.put(&merger.merged(*layer, part, group, job)?, job)?;
                }
                Ok(())
            }
        }
    }

    /// Gathers slices that are too small to read one by one.
    fn select_small(
        &self,
        tensor: &Tensor,
        outer: usize,
        slice: usize,
        indices: &[usize],
        writer: &mut ShardWriter,
        job: &Job,
    ) -> Result<()> {
        let mut block = vec![0; tensor.bytes() as usize / outer.max(1)];
        let mut picked = Vec::new();
        for number in 0..outer {
            self.source.read(tensor, (number * block.len()) as u64, &mut block)?;
            picked.clear();
            for &index in indices {
                picked.extend_from_slice(&block[index * slice..][..slice]);
            }
            writer.put(&picked, job)?;
        }
        Ok(())
    }

    /// Other files, index, config, in this order.
    fn finish(&self, target: &Path, job: &Job) -> Result<()> {
        job.check()?;
        for file in &self.recipe.files {
            let path = self.source.checkpoint.folder.join(file);
            let bytes = fs::read(&path).map_err(Error::io(OP, &path, "read"))?;
            replace(target, file, &bytes)?;
        }
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
        Op::Merge { layer, part, groups } => merger.planned(*layer, part, groups, &output.name)?,
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
    let written = fs::OpenOptions::new().append(true).open(&path).and_then(|mut file| {
        writeln!(file, "{line}")?;
        file.sync_data()
    });
    written.map_err(Error::io(OP, &path, "written"))
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // Writing to a String cannot fail.
        text
    })
}
