//! An installed team; in a process of its own, since a team is installed once.

use ferromoe_core::threads::{Team, for_each, install, is_installed, num_threads, set_num_threads};
use std::panic::catch_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// Promises six threads and comes with fewer, as OpenMP does at its thread limit.
struct Small {
    present: AtomicUsize,
    asked: AtomicUsize,
}

impl Team for Small {
    fn threads(&self) -> usize {
        6
    }

    fn run(&self, threads: usize, worker: &(dyn Fn(usize) + Sync)) {
        self.asked.store(threads, Ordering::Relaxed);
        thread::scope(|scope| {
            for number in 1..self.present.load(Ordering::Relaxed) {
                scope.spawn(move || worker(number));
            }
            worker(0);
        });
    }
}

fn sum_to(n: usize) -> usize {
    let sum = AtomicUsize::new(0);
    for_each(n, 1, |i| {
        for_each(3, 1, |_| assert_eq!(num_threads(), 1));
        sum.fetch_add(i, Ordering::Relaxed);
    });
    sum.into_inner()
}

#[test]
fn a_team_smaller_than_asked_for_does_all_the_work() {
    static TEAM: Small = Small { present: AtomicUsize::new(1), asked: AtomicUsize::new(0) };
    assert!(!is_installed());
    assert!(install(&TEAM));
    assert!(install(&TEAM), "again changes nothing");
    for present in 1..4 {
        TEAM.present.store(present, Ordering::Relaxed);
        assert_eq!(sum_to(1000), 499_500);
        assert_eq!(TEAM.asked.load(Ordering::Relaxed), 6);
    }

    sum_to(4);
    assert_eq!(TEAM.asked.load(Ordering::Relaxed), 4, "no more threads than items");

    set_num_threads(2);
    assert_eq!((num_threads(), sum_to(10)), (2, 45));
    assert_eq!(TEAM.asked.load(Ordering::Relaxed), 2, "the caller's count is a cap");
    set_num_threads(100);
    assert_eq!(num_threads(), 6, "and only a cap");
    set_num_threads(0);

    let result = catch_unwind(|| for_each(10, 1, |i| assert!(i != 7, "seven")));
    assert_eq!(*result.unwrap_err().downcast_ref::<&str>().unwrap(), "seven");
    assert_eq!(sum_to(10), 45);
}
