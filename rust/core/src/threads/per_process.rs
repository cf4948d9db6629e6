//! A value that each process makes for itself.

use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

/// A static value made at first use, and made anew in a forked child.
///
/// A child inherits the parent's memory, but not the threads that were at work on it: a lock may
/// be held for ever, a list half changed. So it never looks at the parent's value, and leaks it.
pub(crate) struct PerProcess<T>(AtomicPtr<Entry<T>>);

struct Entry<T> {
    process: u32,
    value: T,
}

impl<T: Default + Sync + 'static> PerProcess<T> {
    pub(crate) const fn new() -> Self {
        Self(AtomicPtr::new(ptr::null_mut()))
    }

    pub(crate) fn get(&self) -> &'static T {
        let process = process();
        let mut current = self.0.load(Ordering::Acquire);
        loop {
            // SAFETY: null, or made by Box::into_raw below and never freed.
            match unsafe { current.as_ref() } {
                Some(entry) if entry.process == process => return &entry.value,
                _ => {}
            }
            let new = Box::into_raw(Box::new(Entry { process, value: T::default() }));
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

/// A number that differs between a process and its forked children.
///
/// Not the process id: asking for it is a system call, which small kernels feel at each workspace.
#[cfg(target_os = "linux")]
#[allow(unsafe_code, reason = "registers a function that adds to an atomic number")]
fn process() -> u32 {
    use std::sync::atomic::{AtomicBool, AtomicU32};

    static FORKS: AtomicU32 = AtomicU32::new(0);
    static WATCHED: AtomicBool = AtomicBool::new(false);

    extern "C" fn in_child() {
        FORKS.fetch_add(1, Ordering::Relaxed);
    }

    // Not a `Once`: a fork in the middle of it would make the child wait for ever. A fork that is
    // counted twice counts as well.
    if !WATCHED.load(Ordering::Acquire) {
        // SAFETY: what a child runs after the fork may add to an atomic number.
        let refused = unsafe { libc::pthread_atfork(None, None, Some(in_child)) } != 0;
        if refused {
            return std::process::id();
        }
        WATCHED.store(true, Ordering::Release);
    }
    FORKS.load(Ordering::Relaxed)
}

/// A number that differs between a process and its forked children.
#[cfg(not(target_os = "linux"))]
fn process() -> u32 {
    std::process::id()
}
