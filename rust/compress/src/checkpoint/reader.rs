//! Opening a checkpoint folder: which shards it has and where every tensor lies.

use super::{OP, Tensor, header};
use crate::error::{Error, Result};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

/// The name under which an unsharded model is saved.
pub const SINGLE: &str = "model.safetensors";
/// The list of which tensor lies in which shard.
pub const INDEX: &str = "model.safetensors.index.json";

/// One safetensors file.
#[derive(Debug)]
pub struct Shard {
    /// File name inside the folder.
    pub name: String,
    /// Its `__metadata__`.
    pub metadata: BTreeMap<String, String>,
    /// Size of the file.
    pub bytes: u64,
}

/// A checkpoint whose every header has been checked.
#[derive(Debug)]
pub struct Checkpoint {
    /// Where the shards lie.
    pub folder: PathBuf,
    /// In order of their names.
    pub shards: Vec<Shard>,
    /// Shard by shard, in each by position.
    pub tensors: Vec<Tensor>,
    by_name: HashMap<String, usize>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens a folder (sharded or not) or a single file, and checks every header.
    pub fn open(path: &Path) -> Result<Self> {
        let kind = std::fs::metadata(path).map_err(Error::io(OP, path, "opened"))?;
        if !kind.is_dir() {
            refuse_pickle(path, &[path.display().to_string()])?;
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let folder = path.parent().unwrap_or(Path::new("")).to_path_buf();
            return Self::from_shards(folder, &BTreeSet::from([name]));
        }
        let index = path.join(INDEX);
        if index.exists() {
            return Self::from_index(path, &index);
        }
        let mut found = BTreeSet::new();
        let mut pickles = Vec::new();
        for entry in std::fs::read_dir(path).map_err(Error::io(OP, path, "listed"))? {
            let entry = entry.map_err(Error::io(OP, path, "listed"))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            match Path::new(&name).extension().and_then(|extension| extension.to_str()) {
                Some("safetensors") => drop(found.insert(name)),
                Some("bin" | "pt" | "pth" | "ckpt" | "pkl") => pickles.push(name),
                _ => {}
            }
        }
        if found.contains(SINGLE) {
            found = BTreeSet::from([SINGLE.into()]);
        }
        match found.len() {
            1 => Self::from_shards(path.to_path_buf(), &found),
            0 => {
                pickles.sort();
                refuse_pickle(path, &pickles)?;
                Err(Error::Missing {
                    op: OP,
                    path: path.display().to_string(),
                    expected: "hold model.safetensors or model.safetensors.index.json",
                    got: "neither".into(),
                })
            }
            n => Err(Error::value(
                OP,
                path.display().to_string(),
                format!("hold {INDEX} when it has several safetensors files"),
                format!("{n} files and no index"),
            )),
        }
    }

    fn from_index(folder: &Path, path: &Path) -> Result<Self> {
        let text = std::fs::read(path).map_err(Error::io(OP, path, "read"))?;
        let index: Index = serde_json::from_slice(&text).map_err(|error| {
            let what = path.display().to_string();
            Error::value(OP, what, "be JSON with a weight_map", error.to_string())
        })?;
        let shards: BTreeSet<_> = index.weight_map.values().cloned().collect();
        for shard in &shards {
            // A name with folders in it could make us read anywhere.
            if Path::new(shard).file_name() != Some(shard.as_ref()) {
                let what = format!("shard in {}", path.display());
                return Err(Error::value(OP, what, "be a plain file name", format!("{shard:?}")));
            }
        }
        if shards.is_empty() {
            let what = format!("weight_map of {}", path.display());
            return Err(Error::value(OP, what, "name at least one tensor", "none"));
        }
        let checkpoint = Self::from_shards(folder.to_path_buf(), &shards)?;
        for (name, shard) in &index.weight_map {
            let holds = checkpoint.get(name).map(|tensor| &checkpoint.shards[tensor.shard].name);
            if holds != Some(shard) {
                let what = folder.join(shard).display().to_string();
                let got = holds.map_or("no such tensor".into(), |other| format!("it in {other}"));
                return Err(Error::value(OP, what, format!("hold {name}, as the index says"), got));
            }
        }
        Ok(checkpoint)
    }

    fn from_shards(folder: PathBuf, names: &BTreeSet<String>) -> Result<Self> {
        let mut checkpoint =
            Self { folder, shards: Vec::new(), tensors: Vec::new(), by_name: HashMap::new() };
        for (number, name) in names.iter().enumerate() {
            let path = checkpoint.folder.join(name);
            let header = header::read(&path)?;
            let bytes = header.file_bytes;
            checkpoint.shards.push(Shard { name: name.clone(), metadata: header.metadata, bytes });
            for mut tensor in header.tensors {
                tensor.shard = number;
                let id = checkpoint.tensors.len();
                if let Some(other) = checkpoint.by_name.insert(tensor.name.clone(), id) {
                    let other = &checkpoint.shards[checkpoint.tensors[other].shard].name;
                    let what = format!("tensor {} of {}", tensor.name, path.display());
                    return Err(Error::value(
                        OP,
                        what,
                        "be in one shard",
                        format!("it in {other} too"),
                    ));
                }
                checkpoint.tensors.push(tensor);
            }
        }
        Ok(checkpoint)
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        self.by_name.get(name).map(|&id| &self.tensors[id])
    }

    /// Path of a shard.
    pub fn shard_path(&self, shard: usize) -> PathBuf {
        self.folder.join(&self.shards[shard].name)
    }
}

/// Fails when `files`, all there is, are pickles.
fn refuse_pickle(path: &Path, files: &[String]) -> Result<()> {
    let pickle = |file: &String| {
        let extension = Path::new(file).extension().and_then(|extension| extension.to_str());
        matches!(extension, Some("bin" | "pt" | "pth" | "ckpt" | "pkl"))
    };
    let Some(first) = files.iter().find(|file| pickle(file)) else { return Ok(()) };
    Err(Error::value(
        OP,
        path.display().to_string(),
        "hold safetensors weights",
        format!(
            "pickle files only ({first}), which can run code when loaded. Convert them first: load \
             the model with transformers and call save_pretrained"
        ),
    ))
}
