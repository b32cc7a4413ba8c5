//! What a server may forget: everything when it starts, and single locks when its memory is full.

use std::time::{Duration, Instant};

use palisade::Mode::Exclusive as X;
use palisade::backend::{LockBackend, RedisBackend, RedisOptions};
use palisade::protocol::{Acquire, Released, Renewed};
use palisade::{Error, ErrorKind};
use tokio::time::sleep;

use crate::redis_asks::{Client, SOON, left, renew, tokens};
use crate::support::{Events, RedisServer};

const GUARD: Duration = Duration::from_secs(2);

async fn guarded_for(server: &RedisServer, guard: Duration) -> RedisBackend {
    let options = RedisOptions { amnesia_guard: Some(guard), ..RedisOptions::default() };
    RedisBackend::connect(&server.url(), options).await.unwrap()
}

async fn guarded(server: &RedisServer) -> RedisBackend {
    guarded_for(server, GUARD).await
}

async fn plain(server: &RedisServer) -> RedisBackend {
    RedisBackend::connect(&server.url(), RedisOptions::default()).await.unwrap()
}

fn assert_quiet(error: &Error) {
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    assert!(error.to_string().contains("amnesia_guard"), "{error}");
}

/// Asks until it is granted. Returns how long that took.
async fn granted(redis: &RedisBackend, client: &Client, since: Instant) -> Duration {
    loop {
        match redis.acquire(&client.ask(&[("free", X)])).await {
            Ok(acquired) => {
                tokens(&acquired);
                return since.elapsed();
            }
            Err(error) => assert_quiet(&error),
        }
        assert!(since.elapsed() < 3 * SOON);
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_server_that_lost_its_memory_grants_nothing_to_anybody() {
    let server = RedisServer::start();
    let before = plain(&server).await;
    let client = Client::of(&before).await;
    let held = client.ask(&[("k", X)]);
    tokens(&before.acquire(&held).await.unwrap());
    server.kill();
    server.restart_empty();
    // It is kept quiet for longer than this test takes. Two come at once, one knows of no guard.
    let guard = Duration::from_secs(3600);
    let (one, two) = tokio::join!(guarded_for(&server, guard), guarded_for(&server, guard));
    let late = plain(&server).await;
    for redis in [&one, &two, &late, &before] {
        let ask = Acquire { wait: false, ..client.ask(&[("k", X)]) };
        assert_quiet(&redis.acquire(&ask).await.unwrap_err());
        assert_quiet(&redis.acquire(&client.ask(&[("a", X), ("b", X)])).await.unwrap_err());
    }
    let crowd: Vec<_> = (0..64).map(|n| client.ask(&[(&format!("crowd {n}"), X)])).collect();
    let all = futures_util::future::join_all(crowd.iter().map(|ask| two.acquire(ask))).await;
    all.iter().for_each(|refused| assert_quiet(refused.as_ref().unwrap_err()));
    assert_eq!(renew(&before, &held, false).await, Renewed::Lost);
    assert_eq!(left(&server), ["palisade:life"]);
}

#[tokio::test]
async fn it_grants_again_when_the_longest_lease_has_run_out() {
    let server = RedisServer::start();
    let redis = guarded(&server).await;
    let client = Client::of(&redis).await;
    granted(&redis, &client, Instant::now()).await;
    let held = client.ask(&[("k", X)]);
    let token = tokens(&redis.acquire(&held).await.unwrap())[0];
    let begun = Instant::now();
    server.restart_empty();
    let waited = granted(&redis, &client, begun).await;
    println!("granted again {waited:?} after the restart");
    assert!(waited >= GUARD, "{waited:?}");
    let next = client.ask(&[("k", X)]);
    assert!(tokens(&redis.acquire(&next).await.unwrap())[0] > token);
    // Whoever connects in the same life of the server changes nothing.
    guarded_for(&server, Duration::from_secs(3600)).await;
    assert_eq!(redis.release(&next.part).await.unwrap(), Released::Released);
    tokens(&redis.acquire(&held).await.unwrap());
}

#[tokio::test]
async fn a_server_that_has_been_up_for_longer_than_any_lease_is_not_kept_quiet() {
    let server = RedisServer::start();
    let before = plain(&server).await;
    let client = Client::of(&before).await;
    let held = client.ask(&[("k", X)]);
    tokens(&before.acquire(&held).await.unwrap());
    crate::support::wait_until("the server has been up for long enough", SOON, async || {
        let info = server.command(&["INFO", "server"]);
        let up = info.lines().find_map(|line| line.strip_prefix("uptime_in_seconds:"));
        up.unwrap().parse::<u64>().unwrap() > GUARD.as_secs()
    })
    .await;
    let redis = guarded(&server).await;
    tokens(&redis.acquire(&client.ask(&[("other", X)])).await.unwrap());
    assert_eq!(redis.release(&held.part).await.unwrap(), Released::Released);
}

#[tokio::test]
async fn a_guard_costs_the_usual_way_nothing() {
    let server = RedisServer::start();
    let redis = guarded(&server).await;
    let client = Client::of(&redis).await;
    granted(&redis, &client, Instant::now()).await;
    let calls = |server: &RedisServer| -> u64 {
        let stats = server.command(&["INFO", "stats"]);
        let line = stats.lines().find_map(|line| line.strip_prefix("total_commands_processed:"));
        line.unwrap().parse().unwrap()
    };
    let cost = async |redis: &RedisBackend, server: &RedisServer| {
        let client = Client::of(redis).await;
        let before = calls(server);
        for _ in 0..10 {
            let ask = client.ask(&[("k", X)]);
            tokens(&redis.acquire(&ask).await.unwrap());
            redis.release(&ask.part).await.unwrap();
        }
        calls(server) - before
    };
    let with = cost(&redis, &server).await;
    let other = RedisServer::start();
    let without = cost(&plain(&other).await, &other).await;
    println!("{with} commands with the guard, {without} without");
    assert_eq!(with, without);
}

#[tokio::test]
async fn who_may_not_ask_since_when_the_server_runs_cannot_have_a_guard() {
    let server = RedisServer::start();
    server.command(&["ACL", "SETUSER", "default", "-info"]);
    let options = RedisOptions { amnesia_guard: Some(GUARD), ..RedisOptions::default() };
    let error = RedisBackend::connect(&server.url(), options).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.to_string().contains("+info"), "{error}");
    plain(&server).await;
    let options = RedisOptions { amnesia_guard: Some(Duration::ZERO), ..RedisOptions::default() };
    let error = RedisBackend::connect(&server.url(), options).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}

#[tokio::test]
async fn a_server_that_may_evict_locks_is_warned_of() {
    let events = Events::collect();
    let warned = || events.with("maxmemory-policy noeviction").len();
    for (args, expected) in [
        (&["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"][..], 1),
        (&["--maxmemory", "100mb", "--maxmemory-policy", "noeviction"], 0),
        (&["--maxmemory-policy", "volatile-ttl"], 0),
    ] {
        let server = RedisServer::start_with(args);
        let before = warned();
        plain(&server).await;
        assert_eq!(warned() - before, expected, "{args:?}");
    }
    // Who may not look is not told.
    let evicting = ["--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"];
    let server = RedisServer::start_with(&evicting);
    server.command(&["ACL", "SETUSER", "default", "-info"]);
    let before = warned();
    plain(&server).await;
    assert_eq!(warned(), before);
}

#[tokio::test]
async fn what_palisade_did_not_write_is_left_where_the_life_of_the_server_is_kept() {
    let server = RedisServer::start();
    server.command(&["RPUSH", "palisade:life", "1"]);
    let options = RedisOptions { amnesia_guard: Some(GUARD), ..RedisOptions::default() };
    let error = RedisBackend::connect(&server.url(), options).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?}");
    assert_eq!(server.command(&["LRANGE", "palisade:life", "0", "-1"]), "1");
    // A counter that is not ours is not replaced either.
    server.command(&["DEL", "palisade:life"]);
    server.command(&["SET", "palisade:{0}:t", "nan"]);
    guarded(&server).await;
    assert_eq!(server.command(&["GET", "palisade:{0}:t"]), "nan");
}
