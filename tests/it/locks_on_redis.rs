//! The lock service over a real Redis: pushes, lapses, restarts, and futures dropped half-way.

use std::time::{Duration, Instant};

use palisade::{Coordinator, ErrorKind, Locks};

use crate::cancel::at_every_await;
use crate::support::{RedisServer, wait_until};

const SOON: Duration = Duration::from_secs(5);

async fn connect(redis: &RedisServer) -> Locks {
    palisade::connect(&redis.url()).await.unwrap()
}

async fn is_free(locks: &Locks, key: &str) -> bool {
    let seen = locks.inspect(key).await.unwrap();
    seen.holders.is_empty() && seen.waiters.is_empty()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waiter_in_another_client_is_told_at_once_and_in_order() {
    let redis = RedisServer::start();
    let holder = connect(&redis).await.lock("k").acquire().await.unwrap();
    let watcher = connect(&redis).await;
    let (told, mut order) = tokio::sync::mpsc::unbounded_channel();
    for n in 0..4 {
        let (locks, told) = (connect(&redis).await, told.clone());
        tokio::spawn(async move {
            let guard = locks.lock("k").acquire().await.unwrap();
            told.send((n, guard.token())).unwrap();
            guard.release().await.unwrap();
        });
        let waits = async || watcher.inspect("k").await.unwrap().waiters.len() == n + 1;
        wait_until("the request stands in line", SOON, waits).await;
    }
    let released = Instant::now();
    let mut last = holder.token();
    holder.release().await.unwrap();
    for n in 0..4 {
        let (who, token) = order.recv().await.unwrap();
        assert_eq!(who, n, "first come, first served");
        assert!(token > last);
        last = token;
    }
    let took = released.elapsed();
    assert!(took < Duration::from_secs(2), "{took:?}: pushed, not found by a refresh");
}

// On one thread: beside another one an answer may be there before the first poll has ended.
#[tokio::test]
async fn dropping_an_acquire_or_a_release_at_any_await_leaves_nothing() {
    let redis = RedisServer::start();
    let locks = connect(&redis).await;
    let keys = ["a", "b", "c"];
    let free = async || {
        for key in keys {
            wait_until("nothing is left", SOON, async || is_free(&locks, key).await).await;
        }
    };
    let acquire = || locks.lock_all(keys).acquire();
    assert!(at_every_await(acquire, free).await > 0);
    let both = || async { locks.lock_all(keys).acquire().await.unwrap().release().await.unwrap() };
    assert!(at_every_await(both, free).await > 0);

    let holder = locks.lock("b").acquire().await.unwrap();
    let waiting = || locks.lock_all(keys).wait(Duration::from_millis(100)).acquire();
    let none_waits = async || {
        let gone = async || locks.inspect("b").await.unwrap().waiters.is_empty();
        wait_until("no waiter is left", SOON, gone).await;
        assert!(is_free(&locks, "a").await);
    };
    assert!(at_every_await(waiting, none_waits).await > 0);
    holder.release().await.unwrap();
    free().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn begin_and_release_of_any_number_of_keys_are_two_commands() {
    let redis = RedisServer::start();
    let coordinator = Coordinator::builder(connect(&redis).await).build();
    // Scripts are loaded and connections are greeted by the first transaction.
    coordinator.transaction(["warm"]).begin().await.unwrap().commit().await.unwrap();
    for size in [1, 4, 16, 64] {
        let keys: Vec<String> = (0..size).map(|n| format!("key:{n}")).collect();
        let before = sent(&redis);
        coordinator.transaction(&keys).begin().await.unwrap().commit().await.unwrap();
        assert_eq!(sent(&redis) - before, 2, "{size} keys");
    }
}

/// How many scripts were sent, and that nothing else was: `INFO` itself is the only other command.
fn sent(redis: &RedisServer) -> u64 {
    let info = redis.command(&["INFO", "commandstats"]);
    let calls = |name: &str| {
        let line = info.lines().find(|line| line.starts_with(&format!("cmdstat_{name}:")))?;
        line.split("calls=").nth(1)?.split(',').next()?.parse::<u64>().ok()
    };
    assert_eq!(calls("eval"), None, "scripts are sent by their hash once they are loaded");
    calls("evalsha").unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_vanishes_is_followed_within_its_lease() {
    let redis = RedisServer::start();
    let locks = connect(&redis).await;
    let lease = Duration::from_secs(1);
    let request = connect(&redis).await.lock("k").ttl(lease).auto_renew(false);
    std::mem::forget(request.acquire().await.unwrap());
    let started = Instant::now();
    let guard = locks.lock("k").acquire().await.unwrap();
    assert!(started.elapsed() < lease * 3, "{:?}", started.elapsed());
    guard.release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_restart_is_noticed_by_the_holder_and_survived_by_the_waiter() {
    let redis = RedisServer::start();
    let (one, two) = (connect(&redis).await, connect(&redis).await);
    let lease = Duration::from_secs(1);
    let holder = one.lock("k").ttl(lease).acquire().await.unwrap();
    let token = holder.token();
    let waiter = tokio::spawn(two.lock("k").ttl(lease).acquire());
    let waits = async || one.inspect("k").await.unwrap().waiters.len() == 1;
    wait_until("somebody waits", SOON, waits).await;
    redis.restart_empty();
    let next = waiter.await.unwrap().unwrap();
    assert!(next.token() > token, "tokens grow through an empty restart");
    tokio::time::timeout(lease * 4, holder.lost()).await.expect("the holder hears of it");
    assert_eq!(holder.release().await.unwrap_err().kind(), ErrorKind::LeaseLost);
    next.release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_server_makes_begin_fail_within_its_wait_and_is_used_again_when_it_goes_on() {
    let redis = RedisServer::start();
    let coordinator =
        Coordinator::builder(connect(&redis).await).wait(Duration::from_millis(500)).build();
    redis.stop();
    let started = Instant::now();
    let error = coordinator.transaction(["k"]).begin().await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    // Without the wait it would end with the call, after two seconds.
    assert!(started.elapsed() < Duration::from_millis(1_900), "{:?}", started.elapsed());
    redis.cont();
    let again = async || coordinator.transaction(["k"]).begin().await.is_ok();
    wait_until("the server is used again", SOON, again).await;
}
