//! Locks on their own, over the memory backend and a paused clock.

use std::sync::Arc;
use std::time::Duration;

use palisade::backend::MemoryBackend;
use palisade::{Error, ErrorKind, LockOptions, Locks, Mode};
use tokio::time::{Instant, advance, sleep, timeout};

use crate::cancel::at_every_await;

async fn memory() -> (Arc<MemoryBackend>, Locks) {
    with_partitions(1).await
}

async fn with_partitions(partitions: u16) -> (Arc<MemoryBackend>, Locks) {
    let backend = Arc::new(MemoryBackend::with_partitions(partitions));
    let options = LockOptions::default();
    let locks = Locks::with_options(Arc::clone(&backend) as _, options).await.unwrap();
    (backend, locks)
}

async fn another(backend: &Arc<MemoryBackend>) -> Locks {
    let options = LockOptions::default();
    Locks::with_options(Arc::clone(backend) as _, options).await.unwrap()
}

/// The key is free: anyone gets it at once.
async fn assert_free(locks: &Locks, key: &str) {
    let seen = locks.inspect(key).await.unwrap();
    assert!(seen.holders.is_empty() && seen.waiters.is_empty(), "{key}: {seen:?}");
}

/// Lets the background tasks run until they have nothing to do.
async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_waiter_is_handed_the_lock_with_a_higher_token() {
    let (_, locks) = memory().await;
    let first = locks.lock("k").acquire().await.unwrap();
    let second = tokio::spawn(locks.lock("k").acquire());
    settle().await;
    let token = first.token();
    first.release().await.unwrap();
    let started = Instant::now();
    let second = second.await.unwrap().unwrap();
    assert!(second.token() > token);
    assert!(started.elapsed() < Duration::from_millis(5), "it was pushed, not polled for");
    second.confirmed().await.unwrap();
    second.release().await.unwrap();
    assert_free(&locks, "k").await;
}

#[tokio::test(start_paused = true)]
async fn trying_answers_none_and_waiting_answers_timed_out_with_the_key() {
    let (_, locks) = memory().await;
    let _held = locks.lock("k").acquire().await.unwrap();
    assert!(locks.lock("k").try_acquire().await.unwrap().is_none());
    let zero = locks.lock("k").wait(Duration::ZERO).acquire().await.unwrap_err();
    assert_eq!(zero.kind(), ErrorKind::Busy);
    let started = Instant::now();
    let error = locks.lock("k").wait(Duration::from_secs(3)).acquire().await.unwrap_err();
    assert_eq!((error.kind(), error.key().unwrap().as_str()), (ErrorKind::TimedOut, "k"));
    assert!(started.elapsed() < Duration::from_millis(3_100));
    let statistics = locks.statistics();
    assert_eq!((statistics.acquired, statistics.failed, statistics.timed_out), (1, 3, 1));
}

#[tokio::test(start_paused = true)]
async fn the_watchdog_renews_far_beyond_the_lease() {
    let (_, locks) = memory().await;
    let guard = locks.lock("k").ttl(Duration::from_secs(1)).acquire().await.unwrap();
    sleep(Duration::from_secs(60)).await;
    assert!(guard.is_held());
    assert!(locks.statistics().renewed >= 120, "{:?}", locks.statistics());
    assert!(guard.info().expires_in > Duration::from_millis(500));
    assert_eq!(guard.info().hold_count, 1);
    guard.release().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn without_the_watchdog_a_lock_ends_with_its_lease_and_says_so() {
    let (_, locks) = memory().await;
    let request = locks.lock("k").ttl(Duration::from_secs(1)).auto_renew(false);
    let guard = request.acquire().await.unwrap();
    sleep(Duration::from_millis(600)).await;
    guard.renew().await.unwrap();
    sleep(Duration::from_millis(600)).await;
    assert!(guard.is_held());
    let token = guard.cancellation_token();
    timeout(Duration::from_millis(500), guard.lost()).await.unwrap();
    assert!(token.is_cancelled());
    assert_eq!(guard.renew().await.unwrap_err().kind(), ErrorKind::LeaseLost);
    assert_eq!(guard.release().await.unwrap_err().kind(), ErrorKind::LeaseLost);
    assert_eq!(locks.statistics().lost, 1);
}

#[tokio::test(start_paused = true)]
async fn a_service_that_lost_its_memory_costs_the_lease_and_cancels_the_work() {
    let (backend, locks) = memory().await;
    let work = locks.lock("k").ttl(Duration::from_secs(1)).with_lock(async |locked| {
        backend.forget();
        let _other = locks.lock("k").acquire().await?;
        locked.lost().await;
        sleep(Duration::from_secs(3600)).await;
        Ok::<_, Error>(())
    });
    let started = Instant::now();
    assert_eq!(work.await.unwrap_err().kind(), ErrorKind::LeaseLost);
    assert!(started.elapsed() < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn a_waiter_outlives_a_service_that_lost_its_memory() {
    let (backend, locks) = memory().await;
    let held = locks.lock("k").acquire().await.unwrap();
    let waiter = tokio::spawn(locks.lock("k").wait(Duration::from_secs(30)).acquire());
    settle().await;
    backend.forget();
    let guard = waiter.await.unwrap().unwrap();
    assert!(guard.is_held());
    assert_eq!(held.release().await.unwrap_err().kind(), ErrorKind::LeaseLost);
}

#[tokio::test(start_paused = true)]
async fn a_waiter_that_is_alone_in_its_process_keeps_its_place() {
    let (backend, locks) = memory().await;
    let first = locks.lock("k").acquire().await.unwrap();
    // Its watchdog has nothing else to do, and must learn of the waiter.
    let idle = another(&backend).await;
    settle().await;
    let lease = Duration::from_millis(300);
    let second = tokio::spawn(idle.lock("k").ttl(lease).wait(20 * lease).acquire());
    sleep(5 * lease).await;
    assert_eq!(locks.inspect("k").await.unwrap().waiters.len(), 1, "it is refreshed");
    backend.forget();
    second.await.unwrap().expect("it asked again, and was alone").release().await.unwrap();
    drop(first);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_guard_is_released_at_once_in_the_background() {
    let (_, locks) = memory().await;
    drop(locks.lock_all(["a", "b"]).acquire().await.unwrap());
    settle().await;
    assert_free(&locks, "a").await;
    assert_eq!(locks.statistics().active, 0);
}

#[tokio::test(start_paused = true)]
async fn re_entry_keeps_the_token_counts_and_has_a_limit() {
    let (_, locks) = memory().await;
    let owner = locks.owner();
    let request = locks.lock("k").owner(owner).max_entries(3);
    let first = request.clone().acquire().await.unwrap();
    let _writer = tokio::spawn(locks.lock("k").acquire());
    settle().await;
    let second = request.clone().acquire().await.unwrap();
    let reader = locks.lock_all::<&str>([]).shared(["k"]).owner(owner).acquire().await.unwrap();
    assert_eq!((first.token(), first.token()), (second.token(), reader.token()));
    assert_eq!(first.info().hold_count, 3);
    let error = request.acquire().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LimitReached);
    assert_eq!(locks.inspect("k").await.unwrap().holders.len(), 3);
}

#[tokio::test(start_paused = true)]
async fn an_upgrade_is_refused_with_the_keys_to_declare() {
    let (_, locks) = memory().await;
    let owner = locks.owner();
    let none: [&str; 0] = [];
    let _held = locks.lock_all(none).shared(["a", "b"]).owner(owner).acquire().await.unwrap();
    let error = locks.lock("b").owner(owner).acquire().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldDeadlock);
    let declare: Vec<_> =
        error.declare().iter().map(|want| (want.key.as_str(), want.mode)).collect();
    assert_eq!(declare, [("a", Mode::Shared), ("b", Mode::Exclusive)]);
}

#[tokio::test(start_paused = true)]
async fn further_keys_are_tried_in_order_and_refused_out_of_order() {
    let (_, locks) = memory().await;
    let owner = locks.owner();
    let _b = locks.lock("b").owner(owner).acquire().await.unwrap();
    let (a, c) =
        (locks.lock("a").acquire().await.unwrap(), locks.lock("c").acquire().await.unwrap());
    let error = locks.lock("a").owner(owner).acquire().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WouldDeadlock);
    let later = tokio::spawn(locks.lock("c").owner(owner).acquire());
    sleep(Duration::from_millis(50)).await;
    c.release().await.unwrap();
    assert!(later.await.unwrap().unwrap().is_held(), "c sorts after b and became free");
    a.release().await.unwrap();
    let mixed = locks.lock_all(["a", "b"]).owner(owner).acquire().await.unwrap();
    assert_eq!(mixed.keys().len(), 2, "held and new keys, asked for in two calls");
}

#[tokio::test(start_paused = true)]
async fn an_owner_of_another_process_re_enters_and_tries_but_never_waits() {
    let (backend, locks) = memory().await;
    let there = another(&backend).await;
    let owner = locks.owner();
    let guard = locks.lock("k").owner(owner).acquire().await.unwrap();
    let again = there.lock("k").owner(owner).acquire().await.unwrap();
    assert_eq!(again.token(), guard.token());
    let _other = locks.lock("x").acquire().await.unwrap();
    let started = Instant::now();
    let error = there.lock("x").owner(owner).acquire().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(started.elapsed() < Duration::from_millis(10));
}

#[tokio::test(start_paused = true)]
async fn a_set_that_spans_partitions_is_held_as_a_whole_or_not_at_all() {
    let (_, locks) = with_partitions(8).await;
    let keys: Vec<String> = (0..20).map(|n| format!("key:{n}")).collect();
    let guard = locks.lock_all(&keys).acquire().await.unwrap();
    assert_eq!(guard.keys().len(), 20);
    guard.release().await.unwrap();
    let _one = locks.lock("key:13").acquire().await.unwrap();
    assert!(locks.lock_all(&keys).try_acquire().await.unwrap().is_none());
    settle().await;
    for key in keys.iter().filter(|key| *key != "key:13") {
        assert_free(&locks, key).await;
    }
}

#[tokio::test(start_paused = true)]
async fn dropping_an_acquire_at_any_await_leaves_nothing() {
    let (_, locks) = with_partitions(4).await;
    for held in [false, true] {
        let holder = if held { Some(locks.lock("key:3").acquire().await.unwrap()) } else { None };
        let keys = ["key:1", "key:2", "key:3", "key:4", "key:5"];
        let attempt = || locks.lock_all(keys).wait(Duration::from_millis(50)).acquire();
        let check = async || {
            settle().await;
            for key in keys.iter().filter(|key| !(held && **key == "key:3")) {
                assert_free(&locks, key).await;
            }
            assert!(locks.inspect("key:3").await.unwrap().waiters.is_empty());
        };
        let dropped = at_every_await(attempt, check).await;
        assert!(dropped >= usize::from(held), "dropped at {dropped} awaits");
        drop(holder);
        settle().await;
    }
    assert_eq!(locks.statistics().active, 0);
}

#[tokio::test(start_paused = true)]
async fn an_owner_that_was_fenced_out_loses_all_and_gets_nothing_new() {
    let (_, locks) = memory().await;
    let owner = locks.owner();
    let guard = locks.lock("k").owner(owner).acquire().await.unwrap();
    locks.fence_out(owner);
    assert!(!guard.is_held());
    let error = locks.lock("other").owner(owner).acquire().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::StaleToken);
    let seen = locks.inspect("k").await.unwrap();
    assert_eq!(seen.holders.len(), 1, "its own holder releases it, nobody else");
}

#[tokio::test(start_paused = true)]
async fn a_guard_that_was_leaked_ends_with_its_longest_hold() {
    let (_, locks) = memory().await;
    let request = locks.lock("k").ttl(Duration::from_secs(3)).max_hold(Duration::from_secs(30));
    std::mem::forget(request.acquire().await.unwrap());
    sleep(Duration::from_secs(29)).await;
    assert_eq!(locks.inspect("k").await.unwrap().holders.len(), 1);
    sleep(Duration::from_secs(5)).await;
    assert_free(&locks, "k").await;
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_ends_waiters_waits_for_guards_and_takes_the_rest_away() {
    let (_, locks) = memory().await;
    let guard = locks.lock("k").acquire().await.unwrap();
    let leaked = locks.lock("leaked").acquire().await.unwrap();
    let waiter = tokio::spawn(locks.lock("k").acquire());
    settle().await;
    let closing = tokio::spawn({
        let locks = locks.clone();
        async move { locks.shutdown().await }
    });
    assert_eq!(waiter.await.unwrap().unwrap_err().kind(), ErrorKind::Closed);
    assert_eq!(locks.lock("new").acquire().await.unwrap_err().kind(), ErrorKind::Closed);
    guard.release().await.unwrap();
    let error = closing.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    assert!(error.to_string().contains("1 locks"), "{error}");
    assert!(!leaked.is_held());
    assert_free(&locks, "leaked").await;
}

#[tokio::test(start_paused = true)]
async fn bad_input_is_refused_before_anything_is_sent() {
    let (_, locks) = memory().await;
    let none: [&str; 0] = [];
    let many: Vec<_> = (0..1_001).map(|n| n.to_string()).collect();
    let requests = [
        locks.lock(""),
        locks.lock("nul\0"),
        locks.lock("x".repeat(513)),
        locks.lock_all(none),
        locks.lock_all(&many),
        locks.lock("k").ttl(Duration::from_millis(9)),
        locks.lock("k").ttl(Duration::from_secs(86_401)),
    ];
    for request in requests {
        let error = request.acquire().await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
    let twice = locks.lock_all(["a", "a"]).shared(["a"]).acquire().await.unwrap();
    assert_eq!(twice.keys().len(), 1);
    assert_eq!(twice.keys()[0].mode, Mode::Exclusive);
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_leases_are_renewed_in_batches() {
    let (_, locks) = memory().await;
    let mut guards = Vec::new();
    for n in 0..10_000 {
        let request = locks.lock(format!("key:{n}")).ttl(Duration::from_secs(3));
        guards.push(request.acquire().await.unwrap());
    }
    for _ in 0..60 {
        advance(Duration::from_millis(500)).await;
        settle().await;
    }
    assert!(guards.iter().all(|guard| guard.is_held()));
    assert_eq!(locks.statistics().lost, 0);
}

#[tokio::test(start_paused = true)]
async fn a_lapse_is_found_by_a_waiter_that_has_nothing_else_to_do() {
    let (backend, locks) = memory().await;
    let request = locks.lock("k").ttl(Duration::from_secs(1)).auto_renew(false);
    std::mem::forget(request.acquire().await.unwrap());
    let there = another(&backend).await;
    let started = Instant::now();
    let guard = there.lock("k").acquire().await.unwrap();
    assert!(started.elapsed() < Duration::from_millis(1_100), "{:?}", started.elapsed());
    guard.release().await.unwrap();
}
