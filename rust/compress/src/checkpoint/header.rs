//! The header of one safetensors file: `u64` length, JSON, then the tensors' bytes without gaps.

use super::dtype::Dtype;
use super::{OP, Tensor};
use crate::error::{Error, Result};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The format's own limit; a corrupt length would otherwise ask for petabytes.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A validated header.
#[derive(Debug)]
pub struct Header {
    /// By position in the file. `shard` is 0.
    pub tensors: Vec<Tensor>,
    /// The `__metadata__` entry.
    pub metadata: BTreeMap<String, String>,
    /// Size of the whole file.
    pub file_bytes: u64,
}

/// Entries in file order, repeated names included, so that they can be refused.
struct Entries(Vec<(String, serde_json::Value)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Entries;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

/// Reads and checks the header of the file at `path`; touches no tensor's bytes.
pub fn read(path: &Path) -> Result<Header> {
    let mut file = File::open(path).map_err(Error::io(OP, path, "opened"))?;
    let file_bytes = file.metadata().map_err(Error::io(OP, path, "read"))?.len();
    let wrong = |what: &str, expected: String, got: String| {
        Error::value(OP, format!("{what} of {}", path.display()), expected, got)
    };
    if file_bytes < 8 {
        return Err(wrong("size", "be at least 8 bytes".into(), format!("{file_bytes}")));
    }
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(Error::io(OP, path, "read"))?;
    let length = u64::from_le_bytes(length);
    let limit = MAX_HEADER_BYTES.min(file_bytes - 8);
    if length > limit {
        return Err(wrong("header length", format!("be at most {limit}"), format!("{length}")));
    }
    let mut text = vec![0; length as usize];
    file.read_exact(&mut text).map_err(Error::io(OP, path, "read"))?;
    parse(&text, file_bytes, &wrong)
}

fn parse(
    text: &[u8],
    file_bytes: u64,
    wrong: &dyn Fn(&str, String, String) -> Error,
) -> Result<Header> {
    let Entries(entries) = serde_json::from_slice(text)
        .map_err(|error| wrong("header", "be a JSON object".into(), error.to_string()))?;
    let data = 8 + text.len() as u64;
    let mut metadata = BTreeMap::new();
    let mut tensors = BTreeMap::new();
    for (name, value) in entries {
        if name == "__metadata__" {
            metadata = serde_json::from_value(value).map_err(|error| {
                wrong("__metadata__", "map names to strings".into(), error.to_string())
            })?;
            continue;
        }
        let Entry { dtype, shape, data_offsets: (begin, end) } = serde_json::from_value(value)
            .map_err(|error| {
                let expected = "hold dtype, shape and data_offsets".into();
                wrong(&format!("tensor {name}"), expected, error.to_string())
            })?;
        let dtype = Dtype::from_name(&dtype)
            .ok_or_else(|| wrong(&format!("dtype of {name}"), "be known".into(), dtype))?;
        let expected = dtype.bytes(&shape).ok_or_else(|| {
            let expected = "describe whole bytes that fit in 64 bits".into();
            wrong(&format!("shape of {name}"), expected, format!("{shape:?}"))
        })?;
        if begin > end || end - begin != expected {
            let expected = format!("span the {expected} bytes of shape {shape:?} {}", dtype.name());
            return Err(wrong(
                &format!("data_offsets of {name}"),
                expected,
                format!("{begin}..{end}"),
            ));
        }
        // The ends are compared with the file's size below; until then they may be anything.
        let (begin, end) = (data.saturating_add(begin), data.saturating_add(end));
        let tensor = Tensor { name: name.clone(), dtype, shape, shard: 0, begin, end };
        if tensors.insert(name.clone(), tensor).is_some() {
            return Err(wrong("header", "name each tensor once".into(), format!("{name} twice")));
        }
    }
    let mut tensors: Vec<_> = tensors.into_values().collect();
    tensors.sort_by_key(|tensor| (tensor.begin, tensor.end));
    let mut position = data;
    for tensor in &tensors {
        if tensor.begin != position {
            let expected = format!("start where the tensor before it ends, at {}", position - data);
            let got = (tensor.begin - data).to_string();
            return Err(wrong(&format!("data_offsets of {}", tensor.name), expected, got));
        }
        position = tensor.end;
    }
    if position != file_bytes {
        let got =
            format!("{file_bytes}{}", if position > file_bytes { " (truncated?)" } else { "" });
        return Err(wrong("size", format!("be {position} bytes, as its header says"), got));
    }
    Ok(Header { tensors, metadata, file_bytes })
}
