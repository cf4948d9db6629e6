//! The dtypes that a safetensors file may name.

/// A dtype by its name in the file and its width.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dtype(&'static (&'static str, u64));

/// More than arrays in memory have: packed and scale types pass through whole.
static KNOWN: [(&str, u64); 20] = [
    ("BOOL", 8),
    ("F4", 4),
    ("F6_E2M3", 6),
    ("F6_E3M2", 6),
    ("U8", 8),
    ("I8", 8),
    ("F8_E5M2", 8),
    ("F8_E4M3", 8),
    ("F8_E8M0", 8),
    ("I16", 16),
    ("U16", 16),
    ("F16", 16),
    ("BF16", 16),
    ("I32", 32),
    ("U32", 32),
    ("F32", 32),
    ("C64", 64),
    ("F64", 64),
    ("I64", 64),
    ("U64", 64),
];

impl Dtype {
    /// The dtype that files call `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        KNOWN.iter().find(|known| known.0 == name).map(Self)
    }

    /// Its name in the file.
    pub const fn name(self) -> &'static str {
        self.0.0
    }

    /// Bits of one element.
    pub const fn bits(self) -> u64 {
        self.0.1
    }

    /// Bytes of a tensor, if they are whole and can be counted.
    pub fn bytes(self, shape: &[usize]) -> Option<u64> {
        let bits = shape.iter().try_fold(self.bits(), |n, &extent| n.checked_mul(extent as u64))?;
        (bits % 8 == 0).then_some(bits / 8)
    }
}
