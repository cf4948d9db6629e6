use super::*;
use std::sync::atomic::AtomicU8;
use std::time::Duration;

/// The count is the whole process's: one test at a time sets it.
fn with_threads(threads: usize, test: impl FnOnce()) {
    static COUNT: Mutex<()> = Mutex::new(());
    let _alone = COUNT.lock().unwrap_or_else(PoisonError::into_inner);
    set_num_threads(threads);
    test();
    set_num_threads(0);
}

fn times_called(n: usize, grain: usize) -> Vec<u8> {
    let calls: Vec<_> = (0..n).map(|_| AtomicU8::new(0)).collect();
    for_each(n, grain, |i| {
        calls[i].fetch_add(1, Ordering::Relaxed);
    });
    calls.into_iter().map(AtomicU8::into_inner).collect()
}

fn threads_seen(n: usize, grain: usize) -> usize {
    let seen = Mutex::new(std::collections::HashSet::new());
    for_each(n, grain, |_| {
        seen.lock().unwrap().insert(std::thread::current().id());
        std::thread::sleep(Duration::from_millis(2));
    });
    seen.into_inner().unwrap().len()
}

#[test]
fn every_item_runs_once_for_any_size_and_count() {
    for threads in [1, 2, 3, 8] {
        with_threads(threads, || {
            for n in [0, 1, 2, 7, 1000] {
                for grain in [0, 1, 3, 1000, usize::MAX] {
                    assert_eq!(times_called(n, grain), vec![1; n]);
                }
            }
        });
    }
}

#[test]
fn shares_are_a_partition_in_order() {
    for (n, threads) in [(2, 2), (10, 3), (9, 3), (7, 5), (1000, 8)] {
        let mut items = vec![];
        for number in 0..threads {
            let share = Share::new(n, threads, number);
            let before = items.len();
            items.extend(std::iter::from_fn(|| share.claim()));
            assert!((items.len() - before).abs_diff(n / threads) <= 1);
        }
        assert_eq!(items, (0..n).collect::<Vec<_>>());
    }
}

#[test]
fn grain_and_count_limit_the_threads() {
    with_threads(8, || {
        assert_eq!(num_threads(), 8);
        assert_eq!(threads_seen(4, 4), 1);
        assert!(threads_seen(20, 10) <= 2);
        assert!(threads_seen(20, 7) <= 3);
    });
    with_threads(1, || assert_eq!(threads_seen(8, 1), 1));
}

#[test]
fn work_inside_work_runs_inline() {
    with_threads(4, || {
        let inner = AtomicUsize::new(0);
        for_each(8, 1, |_| {
            let outer = std::thread::current().id();
            assert_eq!(num_threads(), 1);
            for_each(5, 1, |_| {
                assert_eq!(std::thread::current().id(), outer);
                inner.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(inner.into_inner(), 40);
        assert_eq!(num_threads(), 4, "the mark is gone afterwards");
    });
}

#[test]
fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
    with_threads(4, || {
        for _ in 0..10 {
            let result = catch_unwind(|| {
                for_each(100, 1, |i| assert!(i != 42, "item {i} is bad"));
            });
            let payload = result.unwrap_err();
            assert_eq!(payload.downcast_ref::<String>().unwrap(), "item 42 is bad");
            assert_eq!(times_called(100, 1), vec![1; 100]);
        }
        let result = catch_unwind(|| for_each(100, 1, |_| panic!("everyone")));
        assert_eq!(*result.unwrap_err().downcast_ref::<&str>().unwrap(), "everyone");
        assert_eq!(num_threads(), 4);
    });
}

#[test]
fn many_callers_at_once_each_get_their_work_done() {
    with_threads(3, || {
        std::thread::scope(|scope| {
            for caller in 0..8 {
                scope.spawn(move || {
                    for call in 0..200 {
                        let n = (caller * 31 + call) % 50;
                        assert_eq!(times_called(n, 1), vec![1; n]);
                    }
                });
            }
        });
    });
}

#[test]
fn the_count_may_change_between_calls() {
    for threads in [2, 5, 1, 3, 2] {
        with_threads(threads, || {
            assert_eq!(num_threads(), threads);
            assert_eq!(times_called(64, 1), vec![1; 64]);
        });
    }
}

#[test]
fn counts_are_read_as_openmp_writes_them() {
    for (text, threads) in [("4", 4), (" 4,2", 4), ("", 0), ("many", 0), ("-1", 0)] {
        assert_eq!(parse_threads(text), threads, "{text:?}");
    }
}
