//! Writing one file so that it is whole under its name, or not there.

use super::{OP, Planned, hexadecimal};
use crate::checkpoint::{Source, Tensor};
use crate::error::{Error, Result};
use crate::job::Job;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// What one read and one write move at most; a cancelled job stops between two of them.
const BLOCK: usize = 4 << 20;

/// What stands between a file's name and the writer's process number until the file is whole.
pub const TEMPORARY: &str = ".tmp-";

/// A shard under its temporary name.
pub struct ShardWriter {
    folder: PathBuf,
    name: String,
    temporary: PathBuf,
    file: File,
    hash: Sha256,
    bytes: u64,
    block: Vec<u8>,
}

impl ShardWriter {
    /// Makes the file and writes its header.
    pub fn create(folder: &Path, name: &str, tensors: &[Planned]) -> Result<Self> {
        let temporary = temporary(folder, name);
        let file = File::create(&temporary).map_err(Error::io(OP, &temporary, "made"))?;
        let (name, folder) = (name.into(), folder.to_path_buf());
        let hash = Sha256::new();
        let mut writer = Self { folder, name, temporary, file, hash, bytes: 0, block: Vec::new() };
        writer.append(&header(tensors))?;
        Ok(writer)
    }

    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io(OP, &self.temporary, "written"))?;
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Bytes written so far, the header among them.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Appends bytes that were computed.
    pub fn put(&mut self, bytes: &[u8], job: &Job) -> Result<()> {
        for block in bytes.chunks(BLOCK) {
            job.check()?;
            self.append(block)?;
            job.advance(block.len() as u64);
        }
        Ok(())
    }

    /// Appends `length` bytes of a tensor of the source, from `offset` on.
    pub fn copy(
        &mut self,
        source: &Source,
        tensor: &Tensor,
        offset: u64,
        length: u64,
        job: &Job,
    ) -> Result<()> {
        let mut block = std::mem::take(&mut self.block);
        let mut done = 0;
        while done < length {
            block.resize((length - done).min(BLOCK as u64) as usize, 0);
            source.read(tensor, offset + done, &mut block)?;
            self.put(&block, job)?;
            done += block.len() as u64;
        }
        self.block = block;
        Ok(())
    }

    /// Syncs the file, gives it its name, and returns its size and hash.
    pub fn finish(self) -> Result<(u64, String)> {
        self.file.sync_data().map_err(Error::io(OP, &self.temporary, "synced"))?;
        rename(&self.temporary, &self.folder, &self.name)?;
        Ok((self.bytes, hexadecimal(&self.hash.clone().finalize())))
    }
}

impl Drop for ShardWriter {
    fn drop(&mut self) {
        // After a finished rename there is nothing under this name.
        let _ = fs::remove_file(&self.temporary);
    }
}

/// Length, JSON padded to 8 bytes, as the format wants it.
fn header(tensors: &[Planned]) -> Vec<u8> {
    let mut entries = serde_json::Map::new();
    entries.insert("__metadata__".into(), serde_json::json!({"format": "pt"}));
    let mut begin = 0;
    for tensor in tensors {
        let end = begin + tensor.bytes();
        let entry = serde_json::json!({
            "dtype": tensor.dtype.name(), "shape": tensor.shape, "data_offsets": [begin, end],
        });
        entries.insert(tensor.name.clone(), entry);
        begin = end;
    }
    let mut text = serde_json::Value::Object(entries).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut header = (text.len() as u64).to_le_bytes().to_vec();
    header.append(&mut text);
    header
}

/// Writes a small file whole, in place of one that may be there.
pub fn replace(folder: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let temporary = temporary(folder, name);
    let written = File::create(&temporary).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_data()
    });
    if let Err(error) = written {
        let _ = fs::remove_file(&temporary);
        return Err(Error::io(OP, &temporary, "written")(error));
    }
    rename(&temporary, folder, name)
}

fn temporary(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}{TEMPORARY}{}", std::process::id()))
}

/// Renames, and syncs the folder, without which the name may be lost with the power.
fn rename(temporary: &Path, folder: &Path, name: &str) -> Result<()> {
    let path = folder.join(name);
    fs::rename(temporary, &path).map_err(Error::io(OP, &path, "named"))?;
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(Error::io(OP, folder, "synced"))
}
