//! What a program can know about its lock service and stores without asking them, and how a holder
//! is warned.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use palisade::{BreakerState, Coordinator, LockOptions, SqlStore, Status};
use sqlx::sqlite::SqlitePoolOptions;
use tokio::time::{Instant, sleep, timeout};

use crate::shaky::{Mood, Shaky};
use crate::support::{RedisServer, wait_until};

const SOON: Duration = Duration::from_secs(20);

#[tokio::test(start_paused = true)]
async fn a_service_is_up_then_degraded_then_down_and_the_reason_is_the_last_failure() {
    let shaky = Shaky::new();
    let locks = shaky.locks(LockOptions::default()).await;
    locks.lock("k").acquire().await.unwrap().release().await.unwrap();
    wait_until("it was probed", SOON, async || locks.health().probed.is_some()).await;
    let health = locks.health();
    assert_eq!((health.status, health.breaker), (Status::Up, BreakerState::Closed));
    assert_eq!((&health.reason, health.clock_skew_us), (&None, None));
    assert!(health.latency.is_some() && health.last_latency.is_some());
    shaky.set(Mood::Fails);
    for (status, breaker) in [
        (Status::Degraded, BreakerState::Closed),
        (Status::Degraded, BreakerState::Closed),
        (Status::Down, BreakerState::Open),
    ] {
        locks.lock("k").try_acquire().await.unwrap_err();
        let health = locks.health();
        assert_eq!((health.status, health.breaker), (status, breaker));
        assert!(health.reason.unwrap().contains("it is down"));
    }
    shaky.set(Mood::Answers);
    sleep(Duration::from_secs(1)).await;
    assert_eq!(locks.health().status, Status::Degraded, "half-open");
    locks.lock("k").acquire().await.unwrap().release().await.unwrap();
    assert_eq!(locks.health().status, Status::Up);
    locks.shutdown().await.unwrap();
    assert_eq!(locks.health().status, Status::Down);
}

#[tokio::test(start_paused = true)]
async fn a_single_failure_is_past_after_a_while_though_nobody_but_the_health_asks() {
    let shaky = Shaky::new();
    let locks = shaky.locks(LockOptions::default()).await;
    shaky.set(Mood::Fails);
    locks.lock("k").try_acquire().await.unwrap_err();
    shaky.set(Mood::Answers);
    assert_eq!(locks.health().status, Status::Degraded);
    wait_until("it is up", Duration::from_secs(60), async || {
        sleep(Duration::from_secs(1)).await;
        locks.health().status == Status::Up
    })
    .await;
}

#[tokio::test(start_paused = true)]
async fn asking_for_the_health_costs_at_most_one_probe_in_five_seconds() {
    let shaky = Shaky::new();
    let locks = shaky.locks(LockOptions::default()).await;
    sleep(Duration::from_secs(60)).await;
    assert_eq!(shaky.pings.load(SeqCst), 0, "nobody has asked");
    for _ in 0..600 {
        sleep(Duration::from_millis(100)).await;
        let _ = locks.health();
    }
    let pings = shaky.pings.load(SeqCst);
    assert!((10..=13).contains(&pings), "{pings} in a minute");
    assert!(locks.health().probed.unwrap() <= Duration::from_secs(6));
}

#[tokio::test(start_paused = true)]
async fn a_watchdog_that_was_late_once_is_not_late_for_ever_in_an_idle_process() {
    let shaky = Shaky::new();
    let locks = shaky.locks(LockOptions::default()).await;
    locks.lock("k").acquire().await.unwrap().release().await.unwrap();
    sleep(Duration::from_millis(1)).await;
    tokio::time::advance(Duration::from_secs(60)).await;
    sleep(Duration::from_millis(1)).await;
    let late = locks.health();
    assert_eq!(late.status, Status::Degraded, "{late:?}");
    wait_until("it is up", SOON, async || {
        sleep(Duration::from_secs(1)).await;
        locks.health().status == Status::Up
    })
    .await;
}

#[tokio::test]
async fn the_clock_of_redis_is_compared_and_all_of_it_can_be_serialized() {
    let redis = RedisServer::start();
    let locks = palisade::connect(&redis.url()).await.unwrap();
    wait_until("it was probed", SOON, async || locks.health().probed.is_some()).await;
    let health = locks.health();
    // The same machine; what may be between them is the time that the answer took.
    assert!(health.clock_skew_us.unwrap().abs() < 20_000_000, "{health:?}");
    let json = serde_json::to_value(&health).unwrap();
    assert_eq!((&json["status"], &json["breaker"]), (&"up".into(), &"closed".into()));
    assert!(json["latency"].as_f64().unwrap() > 0.0, "{json}");
}

// On one thread: the watchdog cannot run while the test holds it.
#[tokio::test]
async fn a_watchdog_that_cannot_run_is_seen_to_be_late() {
    let locks = Shaky::new().locks(LockOptions::default()).await;
    let guard = locks.lock("k").ttl(Duration::from_secs(3)).acquire().await.unwrap();
    wait_until("it is renewed", SOON, async || locks.statistics().renewed > 0).await;
    std::thread::sleep(Duration::from_millis(2_500));
    let health = locks.health();
    assert!(health.watchdog_lag.unwrap() >= Duration::from_secs(1), "{health:?}");
    assert_eq!(health.status, Status::Degraded);
    drop(guard);
}

#[tokio::test]
async fn a_coordinator_is_as_well_as_its_worst_part() {
    let pool =
        SqlitePoolOptions::new().max_connections(2).connect("sqlite::memory:").await.unwrap();
    let bank = SqlStore::new("bank", pool);
    bank.migrate().await.unwrap();
    let locks = Shaky::new().locks(LockOptions::default()).await;
    let coordinator = Coordinator::builder(locks).store(&bank).build();
    let health = coordinator.health();
    assert_eq!(health.status, Status::Up);
    let [store] = &health.stores[..] else { panic!("{health:?}") };
    assert_eq!(store.name, "bank");
    assert!(store.connections.is_some() && store.idle <= store.connections, "{store:?}");
    bank.pool().close().await;
    let health = coordinator.health();
    assert_eq!((health.status, health.stores[0].status), (Status::Down, Status::Down));
    assert_eq!(health.locks.status, Status::Up);
    assert!(health.stores[0].reason.as_ref().unwrap().contains("closed"));
}

#[tokio::test(start_paused = true)]
async fn a_holder_is_warned_while_a_third_of_its_lease_is_left_and_not_after_a_renewal() {
    let shaky = Shaky::new();
    let locks = shaky.locks(LockOptions::default()).await;
    let begun = Instant::now();
    let guard = locks.lock("k").ttl(Duration::from_secs(9)).acquire().await.unwrap();
    // While it is renewed, nobody is warned.
    assert!(timeout(Duration::from_secs(60), guard.expiring()).await.is_err());
    shaky.set(Mood::Hangs);
    let hung = Instant::now();
    guard.expiring().await;
    let warned = hung.elapsed();
    assert!(guard.is_held(), "there is time left");
    assert!((2..=6).contains(&warned.as_secs()), "{warned:?}");
    assert!(guard.info().expires_in <= Duration::from_secs(3));
    let renewed = locks.statistics().renewed;
    shaky.set(Mood::Answers);
    wait_until("it is renewed", SOON, async || locks.statistics().renewed > renewed).await;
    assert!(timeout(Duration::from_secs(60), guard.expiring()).await.is_err());
    shaky.set(Mood::Hangs);
    guard.lost().await;
    timeout(Duration::ZERO, guard.expiring()).await.expect("what is lost is in danger too");
    assert!(begun.elapsed() < Duration::from_secs(200));
}
