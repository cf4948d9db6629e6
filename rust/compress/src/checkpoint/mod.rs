//! Checkpoint folders of transformers: read without loading, rewritten tensor by tensor.

pub mod dtype;
pub mod header;
pub mod reader;
pub mod source;

pub use dtype::Dtype;
pub use reader::Checkpoint;
pub use source::Source;

/// What reading a checkpoint is called in messages.
const OP: &str = "checkpoint";

/// Where one tensor lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Its name, unique in the checkpoint.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Extents.
    pub shape: Vec<usize>,
    /// Which of the checkpoint's shards.
    pub shard: usize,
    /// First byte, counted from the start of the shard.
    pub begin: u64,
    /// Byte after the last.
    pub end: u64,
}

impl Tensor {
    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.end - self.begin
    }
}
