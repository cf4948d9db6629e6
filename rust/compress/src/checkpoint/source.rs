//! Reading tensors' bytes: by position, so that a file cut short by somebody else is an error and
//! not a signal, as it would be with a mapped file.

use super::{Checkpoint, OP, Tensor};
use crate::error::{Error, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;

/// A checkpoint with its shards open.
#[derive(Debug)]
pub struct Source {
    /// Where everything lies.
    pub checkpoint: Checkpoint,
    files: Vec<File>,
}

impl Source {
    /// Opens every shard.
    pub fn open(checkpoint: Checkpoint) -> Result<Self> {
        let files = (0..checkpoint.shards.len())
            .map(|shard| {
                let path = checkpoint.shard_path(shard);
                File::open(&path).map_err(Error::io(OP, &path, "opened"))
            })
            .collect::<Result<_>>()?;
        Ok(Self { checkpoint, files })
    }

    /// The tensor of that name, or an error that names it.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.checkpoint.get(name).ok_or_else(|| Error::Missing {
            op: OP,
            path: self.checkpoint.folder.display().to_string(),
            expected: "hold every tensor that the recipe names",
            got: format!("no {name}"),
        })
    }

    /// Fills `into` with the tensor's bytes from `offset` on.
    pub fn read(&self, tensor: &Tensor, offset: u64, into: &mut [u8]) -> Result<()> {
        debug_assert!(offset + into.len() as u64 <= tensor.bytes());
        self.files[tensor.shard].read_exact_at(into, tensor.begin + offset).map_err(|error| {
            let path = self.checkpoint.shard_path(tensor.shard);
            Error::io(OP, &path, "read as far as its header says")(error)
        })
    }
}
