//! What can be wrong with a call, in the words the user reads.

use thiserror::Error;

/// The result of a kernel.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A call that cannot be carried out. `Display` is the sentence users see; nothing rewrites it.
#[derive(Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument has the wrong shape or length.
    #[error("{op}: {arg} must have shape {expected}, got {got:?}")]
    Shape {
        /// Public name of the operation.
        op: &'static str,
        /// Public name of the argument.
        arg: &'static str,
        /// What the shape must be, in words.
        expected: String,
        /// What it is.
        got: Vec<usize>,
    },
    /// An argument holds a value it may not have.
    #[error("{op}: {arg} must {expected}, got {got}")]
    Value {
        /// Public name of the operation.
        op: &'static str,
        /// Public name of the argument.
        arg: &'static str,
        /// What it must do, continuing "must".
        expected: String,
        /// What it is.
        got: String,
    },
    /// An argument is of the wrong dtype or class.
    #[error("{op}: {arg} must be {expected}, got {got}")]
    Type {
        /// Public name of the operation.
        op: &'static str,
        /// Public name of the argument.
        arg: &'static str,
        /// What it must be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// A combination nobody has written.
    #[error("{op}: {what}")]
    Unsupported {
        /// Public name of the operation.
        op: &'static str,
        /// The combination, as a sentence.
        what: String,
    },
    /// A count does not fit in the index type the kernels use.
    #[error("{op}: {what} must fit in int32")]
    Overflow {
        /// Public name of the operation.
        op: &'static str,
        /// What is being counted.
        what: &'static str,
    },
}

/// Fails unless `got` equals `expected`; both are what the caller sees as the argument's shape.
pub fn check_shape(
    op: &'static str,
    arg: &'static str,
    got: &[usize],
    expected: &[usize],
) -> Result<()> {
    if got == expected {
        return Ok(());
    }
    Err(Error::Shape { op, arg, expected: format!("{expected:?}"), got: got.to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_shape_is_told_with_operation_argument_and_both_shapes() {
        let error = check_shape("permute", "x", &[7, 4095], &[7, 4096]).unwrap_err();
        assert_eq!(error.to_string(), "permute: x must have shape [7, 4096], got [7, 4095]");
    }
}
