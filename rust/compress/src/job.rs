//! Telling a long job to stop, and hearing how far it is.

use crate::error::{Error, Result};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Shared by a running job and whoever watches it.
#[derive(Debug, Default)]
pub struct Job {
    cancelled: AtomicBool,
    done: AtomicU64,
    total: AtomicU64,
    /// A name changes a few times a second and is read as often: nobody waits for this lock.
    doing: Mutex<String>,
}

impl Job {
    /// Asks the job to stop; it does so at its next [`Job::check`].
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Fails once the job was told to stop. Cheap: one relaxed load.
    pub fn check(&self) -> Result<()> {
        if self.cancelled.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Bytes written, bytes to write, and the tensor at hand.
    pub fn progress(&self) -> (u64, u64, String) {
        let doing = self.doing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed), doing.clone())
    }

    pub(crate) fn start(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
    }

    pub(crate) fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn doing(&self, name: &str) {
        let mut doing = self.doing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        name.clone_into(&mut doing);
    }
}
