//! Memory of a GPU as checked views: what slices are on the CPU.
#![allow(unsafe_code, reason = "its constructors carry the promise that addresses are right")]

use ferromoe_core::Dtype;
use std::marker::PhantomData;

/// A contiguous array in a GPU's memory that a kernel reads.
#[derive(Debug, Clone, Copy)]
pub struct Array<'a> {
    address: u64,
    len: usize,
    dtype: Dtype,
    borrow: PhantomData<&'a [u8]>,
}

/// A contiguous array in a GPU's memory that a kernel writes.
#[derive(Debug)]
pub struct ArrayMut<'a> {
    array: Array<'a>,
    borrow: PhantomData<&'a mut [u8]>,
}

impl Array<'_> {
    /// The `len` elements at `address`.
    ///
    /// # Safety
    ///
    /// The elements must lie in memory that the device of the stream used with them can read, stay
    /// allocated until that stream has passed the launches made with them, and not be written
    /// meanwhile but in that stream's order. `address` must be a multiple of the element's size.
    pub unsafe fn new(address: *const u8, len: usize, dtype: Dtype) -> Self {
        Self { address: address.addr() as u64, len, dtype, borrow: PhantomData }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Type of the elements.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Number of bytes.
    pub fn size(&self) -> usize {
        self.len * self.dtype.size()
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }
}

impl ArrayMut<'_> {
    /// The `len` elements at `address`.
    ///
    /// # Safety
    ///
    /// As for [`Array::new`], and nothing else may read or write the elements meanwhile.
    pub unsafe fn new(address: *mut u8, len: usize, dtype: Dtype) -> Self {
        // SAFETY: the caller promises more than Array asks.
        Self { array: unsafe { Array::new(address, len, dtype) }, borrow: PhantomData }
    }
}

impl<'a> std::ops::Deref for ArrayMut<'a> {
    type Target = Array<'a>;

    fn deref(&self) -> &Array<'a> {
        &self.array
    }
}
