//! A value that each process makes for itself.

use std::process;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// A static value made at first use, and made anew in a forked child.
///
/// A child inherits the parent's memory, but not the threads that were at work on it: a lock may
/// be held for ever, a list half changed. So it never looks at the parent's value, and leaks it.
pub(crate) struct PerProcess<T>(AtomicPtr<Entry<T>>);

struct Entry<T> {
    pid: u32,
    value: T,
}

impl<T: Default + Sync + 'static> PerProcess<T> {
    pub(crate) const fn new() -> Self {
        Self(AtomicPtr::new(ptr::null_mut()))
    }

    pub(crate) fn get(&self) -> &'static T {
        let pid = process::id();
        let mut current = self.0.load(Ordering::Acquire);
        loop {
            // SAFETY: null, or made by Box::into_raw below and never freed.
            match unsafe { current.as_ref() } {
                Some(entry) if entry.pid == pid => return &entry.value,
                _ => {}
            }
            let new = Box::into_raw(Box::new(Entry { pid, value: T::default() }));
            match self.0.compare_exchange(current, new, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => current = new,
                Err(other) => {
                    // SAFETY: made two lines up, and nobody else has seen it.
                    drop(unsafe { Box::from_raw(new) });
                    current = other;
                }
            }
        }
    }
}
