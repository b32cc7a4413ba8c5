//! A lock service that fails is left alone, and used again when it works again.

use std::error::Error as _;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use palisade::{BreakerState, ErrorKind, LockOptions, Locks, Status};
use tokio::time::{advance, sleep, timeout};

use crate::shaky::{Mood, Shaky};
use crate::support::{RedisServer, wait_until};

const SOON: Duration = Duration::from_secs(20);

/// Fails as often as it takes to open the breaker.
async fn open(locks: &Locks) {
    for _ in 0..3 {
        let error = locks.lock("opens").try_acquire().await.unwrap_err();
        assert_eq!(error.retry_after(), None, "asked, not refused: {error}");
    }
    assert_eq!(locks.breaker_state(), BreakerState::Open);
}

#[tokio::test(start_paused = true)]
async fn while_it_is_open_nothing_is_sent_and_the_error_names_the_cause_and_the_next_try() {
    let shaky = Shaky::new();
    let locks = shaky.locks(LockOptions::default()).await;
    shaky.set(Mood::Fails);
    open(&locks).await;
    let asked = shaky.acquires.load(SeqCst);
    let error = locks.lock("k").acquire().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.retry_after().unwrap() <= Duration::from_millis(100), "{error:?}");
    assert!(error.to_string().contains("asked again in"), "{error}");
    assert!(error.source().unwrap().to_string().contains("it is down"), "{error:?}");
    assert_eq!(shaky.acquires.load(SeqCst), asked);
}

#[tokio::test(start_paused = true)]
async fn the_watchdog_pings_ever_less_often_and_the_next_request_closes_it() {
    let shaky = Shaky::new();
    let locks = shaky.locks(LockOptions::default()).await;
    shaky.set(Mood::Fails);
    open(&locks).await;
    sleep(Duration::from_secs(60)).await;
    let pings = shaky.pings.load(SeqCst);
    assert!((75..=160).contains(&pings), "{pings} pings in a minute");
    shaky.set(Mood::Answers);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(locks.breaker_state(), BreakerState::HalfOpen);
    let pings = shaky.pings.load(SeqCst);
    sleep(Duration::from_secs(60)).await;
    assert_eq!(shaky.pings.load(SeqCst), pings, "nobody calls, so nobody asks");
    locks.lock("k").acquire().await.unwrap().release().await.unwrap();
    assert_eq!(locks.breaker_state(), BreakerState::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_service_that_answers_pings_and_grants_nothing_is_probed_and_left_alone_again() {
    let shaky = Shaky::new();
    let locks = shaky.locks(LockOptions::default()).await;
    shaky.set(Mood::Full);
    open(&locks).await;
    for _ in 0..3 {
        sleep(Duration::from_secs(1)).await;
        assert_eq!(locks.breaker_state(), BreakerState::HalfOpen);
        let error = locks.lock("k").acquire().await.unwrap_err();
        assert!(error.to_string().contains("it is full"), "{error}");
        assert_eq!(locks.breaker_state(), BreakerState::Open);
    }
}

#[tokio::test(start_paused = true)]
async fn one_request_is_the_probe_and_the_others_are_refused_until_it_is_answered_or_dropped() {
    let shaky = Shaky::new();
    let locks = shaky.locks(LockOptions::default()).await;
    shaky.set(Mood::Fails);
    open(&locks).await;
    shaky.set(Mood::Answers);
    sleep(Duration::from_secs(1)).await;
    shaky.set(Mood::Hangs);
    for _ in 0..3 {
        let asked = shaky.acquires.load(SeqCst);
        let mut probe = Box::pin(locks.lock("probe").acquire());
        assert!(timeout(Duration::from_millis(1), &mut probe).await.is_err());
        assert_eq!(shaky.acquires.load(SeqCst), asked + 1, "the probe is sent");
        let refused = locks.lock("k").acquire().await.unwrap_err();
        assert_eq!(refused.retry_after(), Some(Duration::ZERO));
        assert_eq!(shaky.acquires.load(SeqCst), asked + 1, "nothing else is");
        drop(probe);
        assert_eq!(locks.breaker_state(), BreakerState::HalfOpen, "who goes away says nothing");
    }
    // One that is kept and never polled again holds the others up for one call's time and a bit.
    let mut kept = Box::pin(locks.lock("kept").acquire());
    assert!(timeout(Duration::from_millis(1), &mut kept).await.is_err());
    shaky.set(Mood::Answers);
    assert!(locks.lock("k").acquire().await.is_err());
    sleep(locks.options().call_timeout * 5 / 4).await;
    locks.lock("k").acquire().await.unwrap().release().await.unwrap();
    assert_eq!(locks.breaker_state(), BreakerState::Closed);
}

#[tokio::test(start_paused = true)]
async fn what_is_held_is_renewed_and_released_while_it_is_open_and_who_waits_is_served() {
    let shaky = Shaky::new();
    let locks = shaky.locks(LockOptions::default()).await;
    let held = locks.lock("k").acquire().await.unwrap();
    let waiter = tokio::spawn(locks.lock("k").wait(Duration::from_secs(60)).acquire());
    while locks.inspect("k").await.unwrap().waiters.is_empty() {
        tokio::task::yield_now().await;
    }
    shaky.set(Mood::Full);
    open(&locks).await;
    // For longer than a lease.
    for _ in 0..20 {
        sleep(Duration::from_secs(1)).await;
        let _ = locks.lock("other").try_acquire().await.unwrap_err();
        assert_ne!(locks.breaker_state(), BreakerState::Closed);
    }
    held.renew().await.unwrap();
    held.release().await.unwrap();
    waiter.await.unwrap().unwrap().release().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_goes_away_and_a_refusal_for_a_reason_say_nothing_against_the_service() {
    let shaky = Shaky::new();
    let locks = shaky.locks(LockOptions::default()).await;
    let held = locks.lock("k").acquire().await.unwrap();
    for _ in 0..20 {
        assert!(locks.lock("k").try_acquire().await.unwrap().is_none());
    }
    shaky.set(Mood::Hangs);
    for _ in 0..20 {
        let request = locks.lock("other").acquire();
        assert!(timeout(Duration::from_millis(1), request).await.is_err());
    }
    assert_eq!(locks.breaker_state(), BreakerState::Closed);
    shaky.set(Mood::Answers);
    held.release().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_process_that_stood_still_says_nothing_against_the_service() {
    let shaky = Shaky::new();
    let locks = shaky.locks(LockOptions::default()).await;
    shaky.set(Mood::Hangs);
    let limit = LockOptions::default().call_timeout;
    for (passed, state) in [(limit * 30, BreakerState::Closed), (limit, BreakerState::Open)] {
        for _ in 0..3 {
            let asked = tokio::spawn(locks.lock("k").try_acquire());
            sleep(Duration::from_millis(1)).await;
            advance(passed).await;
            assert_eq!(asked.await.unwrap().unwrap_err().kind(), ErrorKind::Unavailable);
        }
        assert_eq!(locks.breaker_state(), state, "after time-outs of {passed:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_breaker_that_is_disabled_refuses_nothing() {
    let shaky = Shaky::new();
    let mut options = LockOptions::default();
    options.breaker.enabled = false;
    let locks = shaky.locks(options).await;
    shaky.set(Mood::Fails);
    for n in 1..50 {
        let error = locks.lock("k").acquire().await.unwrap_err();
        assert_eq!(error.retry_after(), None);
        assert_eq!(shaky.acquires.load(SeqCst), n);
    }
    let health = locks.health();
    assert_eq!((health.status, health.breaker), (Status::Degraded, BreakerState::Closed));
    assert!(health.reason.unwrap().contains("it is down"));
}

#[tokio::test(start_paused = true)]
async fn times_without_end_cost_no_lease() {
    let mut patient = LockOptions::default();
    patient.call_timeout = Duration::MAX;
    let mut resigned = LockOptions::default();
    (resigned.breaker.open.first, resigned.breaker.open.max) = (Duration::MAX, Duration::MAX);
    for options in [patient, resigned] {
        let shaky = Shaky::new();
        let locks = shaky.locks(options).await;
        let held = locks.lock("held").acquire().await.unwrap();
        shaky.set(Mood::Fails);
        open(&locks).await;
        shaky.set(Mood::Hangs);
        // The service is asked whether it is back, and leaves that unanswered.
        sleep(Duration::from_secs(1)).await;
        shaky.set(Mood::Answers);
        sleep(Duration::from_secs(60)).await;
        assert!(held.is_held(), "{options:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn dropped_locks_ask_no_more() {
    let shaky = Shaky::new();
    let tasks = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let locks = shaky.locks(LockOptions::default()).await;
    shaky.set(Mood::Fails);
    open(&locks).await;
    drop(locks);
    wait_until("its task has ended", SOON, async || {
        tokio::runtime::Handle::current().metrics().num_alive_tasks() == tasks
    })
    .await;
}

/// Asks until the breaker is open, at most for some seconds.
async fn until_open(locks: &Locks) {
    wait_until("the breaker is open", SOON, async || {
        let _ = locks.lock("opens").wait(Duration::from_millis(100)).acquire().await;
        locks.breaker_state() == BreakerState::Open
    })
    .await;
}

/// Asks until a lock is granted again, by the same client.
async fn until_closed(locks: &Locks) {
    wait_until("locks are granted again", SOON, async || {
        match locks.lock("k").wait(Duration::from_millis(100)).acquire().await {
            Ok(guard) => guard.release().await.is_ok(),
            Err(_) => false,
        }
    })
    .await;
    assert_eq!(locks.breaker_state(), BreakerState::Closed);
}

/// The least time that one of several requests took. A machine that is busy with other things may
/// make any of them slow, but hardly all.
async fn quickest_refusal(locks: &Locks) -> Duration {
    let mut quickest = Duration::MAX;
    for _ in 0..100 {
        let begun = Instant::now();
        let error = locks.lock("k").acquire().await.unwrap_err();
        if error.retry_after().is_some() {
            quickest = quickest.min(begun.elapsed());
        }
    }
    quickest
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_was_killed_is_left_alone_and_used_again_when_it_is_back() {
    let redis = RedisServer::start();
    let locks = palisade::connect(&redis.url()).await.unwrap();
    for _ in 0..2 {
        until_closed(&locks).await;
        redis.kill();
        until_open(&locks).await;
        let quickest = quickest_refusal(&locks).await;
        assert!(quickest < Duration::from_millis(100), "{quickest:?}: nothing was sent");
        redis.restart_empty();
    }
    until_closed(&locks).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_stopped_answering_is_left_alone_and_used_again_when_it_goes_on() {
    let redis = RedisServer::start();
    let locks = palisade::connect(&redis.url()).await.unwrap();
    until_closed(&locks).await;
    let held = locks.lock("held").ttl(Duration::from_secs(60)).acquire().await.unwrap();
    redis.stop();
    until_open(&locks).await;
    let quickest = quickest_refusal(&locks).await;
    assert!(quickest < Duration::from_millis(100), "{quickest:?}: nothing was sent");
    assert!(held.is_held(), "what was held before goes by its lease");
    redis.cont();
    until_closed(&locks).await;
    held.release().await.unwrap();
}
