//! All parallel work of the kernels: `for_each(n, grain, f)` on the installed team.
//!
//! torch's workers spin on the cores for a while after each of its operations, so a second pool
//! beside them loses milliseconds per call. The Python side therefore installs torch's own OpenMP
//! team as a [`Team`]; without torch, and in a forked child, an own spin-then-park pool works.
#![allow(unsafe_code, reason = "the pool lends borrowed work to threads that live longer")]

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

mod per_process;
mod pool;

pub(crate) use per_process::PerProcess;

/// Threads of somebody else that kernels may work on.
pub trait Team: Sync {
    /// Threads that work started now by this thread may use; 1 inside the team's own work.
    fn threads(&self) -> usize;

    /// Calls `worker` on at least one and at most `threads` threads, each with a number of its own.
    ///
    /// Returns when all of them have. `worker` does not unwind.
    fn run(&self, threads: usize, worker: &(dyn Fn(usize) + Sync));
}

/// Calls `f(i)` once for every `i < n`, on at most `n / grain` threads (rounded up).
///
/// `grain` is the number of items that pay for waking a thread; up to it everything runs inline,
/// and so does everything inside another `for_each`. What `f` computes must not depend on which
/// thread runs an item, nor on the order.
///
/// # Panics
///
/// With the panic of `f`, if it panics, once all threads are done; items may be left out then.
pub fn for_each(n: usize, grain: usize, f: impl Fn(usize) + Sync) {
    let wanted = n.div_ceil(grain.max(1));
    let threads = if wanted <= 1 { 1 } else { wanted.min(num_threads()) };
    if threads <= 1 {
        return (0..n).for_each(f);
    }
    let shares: Vec<_> = (0..threads).map(|number| Share::new(n, threads, number)).collect();
    let panic: Mutex<Option<Box<dyn Any + Send>>> = Mutex::new(None);
    let worker = |number: usize| {
        let _inside = Inside::enter();
        // Unwind safety: the caller unwinds too, so nobody looks at what `f` left half done.
        let result = catch_unwind(AssertUnwindSafe(|| {
            for other in 0..threads {
                let share = &shares[(number + other) % threads];
                while let Some(i) = share.claim() {
                    f(i);
                }
            }
        }));
        if let Err(payload) = result {
            shares.iter().for_each(Share::abandon);
            panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
        }
    };
    match installed() {
        Some(team) => team.run(threads, &worker),
        None => pool::run(threads, &worker),
    }
    if let Some(payload) = panic.into_inner().unwrap_or_else(PoisonError::into_inner) {
        resume_unwind(payload);
    }
}

/// The items that one thread begins with. It takes them in order, so that from call to call the
/// same core meets the same memory; who is through with its own goes on with the others'.
#[repr(align(128))] // two cache lines, which processors fetch in pairs
struct Share {
    next: AtomicUsize,
    end: usize,
}

impl Share {
    fn new(n: usize, threads: usize, number: usize) -> Self {
        let (size, rest) = (n / threads, n % threads);
        let begin = |number: usize| number * size + number.min(rest);
        Self { next: AtomicUsize::new(begin(number)), end: begin(number + 1) }
    }

    fn claim(&self) -> Option<usize> {
        let i = self.next.fetch_add(1, Ordering::Relaxed);
        (i < self.end).then_some(i)
    }

    fn abandon(&self) {
        self.next.store(self.end, Ordering::Relaxed);
    }
}

/// Threads that a large [`for_each`] would use if called here; 1 inside another.
pub fn num_threads() -> usize {
    if Inside::get() {
        return 1;
    }
    // The team of a parent process counts for the child too, although it cannot work there.
    match TEAM.get() {
        Some((_, team)) => match limit() {
            0 => team.threads(),
            limit => team.threads().min(limit),
        },
        None => match limit() {
            0 => default_threads(),
            limit => limit,
        },
    }
    .max(1)
}

/// Sets the number of threads of the own pool, and the most that an installed team may use.
///
/// It goes before the environment variable `FERROMOE_NUM_THREADS`, which means the same; 0 takes it
/// back.
pub fn set_num_threads(threads: usize) {
    WANTED.store(threads, Ordering::Relaxed);
}

/// Makes this process work on `team`; only the first call counts. Returns [`is_installed`].
///
/// A forked child of this process works on the own pool: the team's threads are not in it.
pub fn install(team: &'static dyn Team) -> bool {
    TEAM.get_or_init(|| (std::process::id(), team));
    is_installed()
}

/// Whether this process works on an installed team.
pub fn is_installed() -> bool {
    installed().is_some()
}

static TEAM: OnceLock<(u32, &'static dyn Team)> = OnceLock::new();

fn installed() -> Option<&'static dyn Team> {
    TEAM.get().filter(|(pid, _)| *pid == std::process::id()).map(|(_, team)| *team)
}

static WANTED: AtomicUsize = AtomicUsize::new(0);

/// What the caller, or else the environment, allows; 0 is no limit.
fn limit() -> usize {
    static ENVIRONMENT: AtomicUsize = AtomicUsize::new(UNKNOWN);
    match WANTED.load(Ordering::Relaxed) {
        0 => known(&ENVIRONMENT, || from_environment("FERROMOE_NUM_THREADS")),
        wanted => wanted,
    }
}

fn default_threads() -> usize {
    static DEFAULT: AtomicUsize = AtomicUsize::new(UNKNOWN);
    known(&DEFAULT, || match from_environment("OMP_NUM_THREADS") {
        // It knows the affinity mask and the control group's quota.
        0 => std::thread::available_parallelism().map_or(1, Into::into),
        threads => threads,
    })
}

const UNKNOWN: usize = usize::MAX;

/// Not a `OnceLock`: a fork in the middle of its initialisation would make the child wait for ever.
fn known(cache: &AtomicUsize, find: impl Fn() -> usize) -> usize {
    match cache.load(Ordering::Relaxed) {
        UNKNOWN => {
            let found = find();
            cache.store(found, Ordering::Relaxed);
            found
        }
        found => found,
    }
}

/// The first number of a list such as `4,2`, as OpenMP writes nested levels; 0 if there is none.
fn from_environment(variable: &str) -> usize {
    std::env::var(variable).map_or(0, |text| parse_threads(&text))
}

fn parse_threads(text: &str) -> usize {
    text.split(',').next().and_then(|first| first.trim().parse().ok()).unwrap_or(0)
}

/// Marks the thread as working for a `for_each`.
struct Inside(bool);

thread_local!(static INSIDE: Cell<bool> = const { Cell::new(false) });

impl Inside {
    fn enter() -> Self {
        Self(INSIDE.replace(true))
    }

    fn get() -> bool {
        INSIDE.get()
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.set(self.0);
    }
}

#[cfg(test)]
mod tests;
