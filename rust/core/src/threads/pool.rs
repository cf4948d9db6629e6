//! The own pool: threads that spin for a moment after work and then park.

use super::PerProcess;
use std::hint;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long a thread looks for work before it parks, and the caller for the end of it. About what
/// a Python function takes between two kernels, and what parking and waking cost together.
const SPIN: Duration = Duration::from_micros(100);

type Worker<'a> = &'a (dyn Fn(usize) + Sync);

/// Calls `worker` on this thread and on up to `threads - 1` others.
///
/// A thread that wakes late does not join, so a caller never waits for one that has done nothing.
/// One caller at a time has the pool; another that comes meanwhile works alone, which cannot
/// deadlock.
pub(super) fn run(threads: usize, worker: Worker<'_>) {
    static POOL: PerProcess<Pool> = PerProcess::new();
    POOL.get().run(threads, worker);
}

#[derive(Default)]
struct Pool {
    /// Threads started so far; held by the caller whose work is on the board.
    turn: Mutex<usize>,
    board: Mutex<Board>,
    /// Signals new work to parked threads.
    work: Condvar,
    /// Signals the caller that a thread is done.
    done: Condvar,
    /// Copies of the fields of the board of the same name, to spin on without its lock.
    round: AtomicUsize,
    active: AtomicUsize,
    /// More threads than processors: who spins keeps another from its work.
    crowded: AtomicBool,
}

#[derive(Default)]
struct Board {
    /// Counts the pieces of work so far.
    round: usize,
    job: Option<Worker<'static>>,
    /// Threads with a number below this may join; 0 when the job is over.
    threads: usize,
    /// Threads that joined and are not done.
    active: usize,
    parked: usize,
}

impl Pool {
    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&'static self, threads: usize, worker: Worker<'_>) {
        if let Ok(mut started) = self.turn.try_lock() {
            self.start(&mut started, threads - 1);
            self.share(threads, worker);
        } else {
            worker(0);
        }
    }

    /// Sees to it that there are `wanted` threads; with fewer, if the system gives no more.
    fn start(&'static self, started: &mut usize, wanted: usize) {
        if *started >= wanted {
            return;
        }
        let processors = thread::available_parallelism().map_or(1, Into::into);
        self.crowded.store(wanted + 1 > processors, Ordering::Relaxed);
        while *started < wanted {
            let number = *started + 1;
            let seen = self.board().round;
            let thread = thread::Builder::new().name(format!("ferromoe-{number}"));
            if thread.spawn(move || self.serve(number, seen)).is_err() {
                return;
            }
            *started += 1;
        }
    }

    /// The caller's side; only with `turn` held.
    fn share(&self, threads: usize, worker: Worker<'_>) {
        // SAFETY: only the lifetime is changed. A thread takes the job off the board while it is
        // open and counts as active until it has returned from it; below, the board is closed and
        // no thread is active before `worker`'s borrow ends. `worker` does not unwind.
        let job = unsafe { std::mem::transmute::<Worker<'_>, Worker<'static>>(worker) };
        let mut board = self.board();
        board.round = board.round.wrapping_add(1);
        board.job = Some(job);
        board.threads = threads;
        self.round.store(board.round, Ordering::Release);
        let parked = board.parked;
        drop(board);
        if parked > 0 {
            self.work.notify_all();
        }

        worker(0);

        let mut board = self.board();
        board.job = None;
        board.threads = 0;
        if board.active > 0 {
            drop(board);
            self.spin_while(|| self.active.load(Ordering::Acquire) > 0);
            board = self.board();
            while board.active > 0 {
                board = self.done.wait(board).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// A thread's side. `seen` is the last round that was before its time.
    ///
    /// Its number stays its own, so that it meets the same items from call to call.
    fn serve(&self, number: usize, mut seen: usize) {
        loop {
            let mut board = self.board();
            while board.round == seen {
                board.parked += 1;
                board = self.work.wait(board).unwrap_or_else(PoisonError::into_inner);
                board.parked -= 1;
            }
            seen = board.round;
            let Some(job) = board.job.filter(|_| number < board.threads) else { continue };
            board.active += 1;
            self.active.store(board.active, Ordering::Release);
            drop(board);

            job(number);

            let mut board = self.board();
            board.active -= 1;
            self.active.store(board.active, Ordering::Release);
            if board.active == 0 {
                self.done.notify_one();
            }
            drop(board);
            self.spin_while(|| self.round.load(Ordering::Acquire) == seen);
        }
    }

    /// Looks at `waiting` until it is over or [`SPIN`] has passed.
    fn spin_while(&self, waiting: impl Fn() -> bool) {
        if self.crowded.load(Ordering::Relaxed) {
            return;
        }
        let start = Instant::now();
        while waiting() && start.elapsed() < SPIN {
            for _ in 0..32 {
                hint::spin_loop();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;

    /// A pool that no other test uses meanwhile.
    fn pool() -> &'static Pool {
        Box::leak(Box::default())
    }

    /// Returns only if `threads` threads work at the same time.
    fn meet(pool: &'static Pool, threads: usize) {
        let barrier = Barrier::new(threads);
        let met = AtomicUsize::new(0);
        pool.run(threads, &|_| {
            barrier.wait();
            met.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(met.into_inner(), threads);
    }

    #[test]
    fn threads_work_at_the_same_time_after_work_and_after_a_pause() {
        for threads in [2, 3, 8] {
            let pool = pool();
            for round in 0..20 {
                if round % 5 == 0 {
                    thread::sleep(3 * SPIN); // until they are parked
                }
                meet(pool, threads);
            }
        }
    }

    #[test]
    fn it_grows_and_serves_smaller_work_afterwards() {
        let pool = pool();
        for threads in [2, 5, 3, 2, 6] {
            meet(pool, threads);
        }
        assert_eq!(*pool.turn.lock().unwrap(), 5);
    }

    #[test]
    fn each_thread_has_a_number_of_its_own() {
        let numbers = Mutex::new(vec![]);
        let barrier = Barrier::new(4);
        pool().run(4, &|number| {
            barrier.wait();
            numbers.lock().unwrap().push(number);
        });
        let mut numbers = numbers.into_inner().unwrap();
        numbers.sort_unstable();
        assert_eq!(numbers, [0, 1, 2, 3]);
    }

    #[test]
    fn a_second_caller_works_alone() {
        let pool = pool();
        let inside = AtomicUsize::new(0);
        let _turn = pool.turn.lock().unwrap();
        pool.run(4, &|number| {
            inside.fetch_add(10 + number, Ordering::Relaxed);
        });
        assert_eq!(inside.into_inner(), 10);
    }
}
