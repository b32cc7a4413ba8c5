//! Grants that replicas have to know of.

use std::time::Duration;

use futures_util::future::join_all;
use palisade::backend::{LockBackend, MinReplicas, RedisBackend, RedisOptions};
use palisade::protocol::{Acquired, Inspection, Released, Renewed};
use palisade::{ErrorKind, Mode::Exclusive as X};

use crate::redis_asks::{Client, P0, SOON, key, renew, tokens};
use crate::support::{RedisServer, wait_until};

/// A server and a replica of it that has caught up.
async fn pair() -> (RedisServer, RedisServer) {
    let master = RedisServer::start_with(&["--repl-diskless-sync-delay", "0"]);
    let port = master.port().to_string();
    let replica = RedisServer::start_with(&["--replicaof", &format!("127.0.0.1 {port}")]);
    online(&master).await;
    (master, replica)
}

async fn online(master: &RedisServer) {
    wait_until("the replica has caught up", 3 * SOON, async || {
        master.command(&["INFO", "replication"]).contains("state=online")
    })
    .await;
}

async fn connect(server: &RedisServer, count: u32, within: Duration) -> RedisBackend {
    let min_replicas = Some(MinReplicas { count, within });
    let options = RedisOptions { min_replicas, ..RedisOptions::default() };
    RedisBackend::connect(&server.url(), options).await.unwrap()
}

#[tokio::test]
async fn a_grant_is_on_the_replica_before_anybody_hears_of_it() {
    let (master, replica) = pair().await;
    let redis = connect(&master, 1, SOON).await;
    let client = Client::of(&redis).await;
    let head = |n: u32| format!("palisade:{{0}}:k:{n}");
    for n in 0..50 {
        let ask = client.ask(&[(&n.to_string(), X)]);
        tokens(&redis.acquire(&ask).await.unwrap());
        assert_eq!(replica.command(&["EXISTS", &head(n)]), "1", "{n}");
    }
    // Many at once share the waiting.
    let before = waits(&master);
    let asks: Vec<_> = (100..300).map(|n| client.ask(&[(&n.to_string(), X)])).collect();
    let all = join_all(asks.iter().map(|ask| redis.acquire(ask))).await;
    all.iter().for_each(|acquired| assert_eq!(tokens(acquired.as_ref().unwrap()).len(), 1));
    assert_eq!(replica.command(&["EXISTS", &head(299)]), "1");
    let waits = waits(&master) - before;
    println!("{waits} WAIT for 200 grants");
    assert!(waits < 100, "{waits}");
}

/// How often WAIT was called.
fn waits(server: &RedisServer) -> usize {
    let stats = server.command(&["INFO", "commandstats"]);
    let line = stats.lines().find_map(|line| line.strip_prefix("cmdstat_wait:calls="));
    line.map_or(0, |line| line.split(',').next().unwrap().parse().unwrap())
}

#[tokio::test]
async fn a_grant_that_too_few_replicas_know_of_is_given_up_and_nobody_is_held_up() {
    let (master, replica) = pair().await;
    let plain = RedisBackend::connect(&master.url(), RedisOptions::default()).await.unwrap();
    let redis = connect(&master, 1, Duration::from_millis(300)).await;
    let client = Client::of(&redis).await;
    let held = client.ask(&[("held", X)]);
    tokens(&plain.acquire(&held).await.unwrap());
    replica.stop();
    let ask = client.ask(&[("k", X)]);
    let (refused, renewed) = tokio::join!(redis.acquire(&ask), renew(&redis, &held, false));
    let refused = refused.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Unavailable, "{refused:?}");
    assert!(refused.to_string().contains("min_replicas"), "{refused}");
    assert_eq!(renewed, Renewed::Held(None), "a renewal waits for no replica");
    assert_eq!(plain.inspect(P0, &key("k")).await.unwrap(), Inspection::default());
    assert_eq!(redis.release(&held.part).await.unwrap(), Released::Released);
    // When the replica is back, the same request is granted.
    replica.cont();
    online(&master).await;
    let again = async {
        loop {
            if let Ok(acquired) = redis.acquire(&ask).await {
                return acquired;
            }
        }
    };
    tokens(&tokio::time::timeout(SOON, again).await.unwrap());
}

#[tokio::test]
async fn a_hand_over_is_told_when_replicas_know_of_it() {
    let (master, replica) = pair().await;
    let plain = RedisBackend::connect(&master.url(), RedisOptions::default()).await.unwrap();
    let (one, two) =
        (connect(&master, 1, SOON).await, connect(&master, 1, Duration::from_millis(300)).await);
    let (a, b) = (Client::of(&one).await, Client::of(&two).await);
    let (first, second, third) = (a.ask(&[("k", X)]), a.ask(&[("k", X)]), b.ask(&[("k", X)]));
    tokens(&plain.acquire(&first).await.unwrap());
    one.acquire(&second).await.unwrap();
    two.acquire(&third).await.unwrap();
    plain.release(&first.part).await.unwrap();
    wait_until("the grant is pushed", SOON, async || a.was_told(&second)).await;
    replica.stop();
    assert_eq!(plain.release(&second.part).await.unwrap(), Released::Released);
    // Who asks is told that it has lost what it was granted, and gives it up.
    assert_eq!(renew(&two, &third, true).await, Renewed::Lost);
    assert!(!b.was_told(&third));
    assert_eq!(plain.inspect(P0, &key("k")).await.unwrap().holders.len(), 1);
    two.cancel(&third.part).await.unwrap();
    assert_eq!(plain.inspect(P0, &key("k")).await.unwrap(), Inspection::default());
    replica.cont();
}

#[tokio::test]
async fn a_replica_that_was_promoted_knows_of_the_grant() {
    let (master, replica) = pair().await;
    let redis = connect(&master, 1, SOON).await;
    let client = Client::of(&redis).await;
    let ask = client.ask(&[("k", X)]);
    let token = tokens(&redis.acquire(&ask).await.unwrap())[0];
    master.kill();
    replica.command(&["REPLICAOF", "NO", "ONE"]);
    let promoted = RedisBackend::connect(&replica.url(), RedisOptions::default()).await.unwrap();
    let next = client.ask(&[("k", X)]);
    assert!(matches!(promoted.acquire(&next).await.unwrap(), Acquired::Queued { .. }));
    assert_eq!(promoted.inspect(P0, &key("k")).await.unwrap().holders[0].token, token);
}

#[tokio::test]
async fn a_server_without_replicas_grants_nothing_where_some_are_wanted() {
    let server = RedisServer::start();
    let redis = connect(&server, 1, Duration::from_millis(50)).await;
    let client = Client::of(&redis).await;
    let asks: Vec<_> = (0..20).map(|n| client.ask(&[(&n.to_string(), X)])).collect();
    let all = join_all(asks.iter().map(|ask| redis.acquire(ask))).await;
    assert!(all.iter().all(|acquired| acquired.as_ref().unwrap_err().is_unavailable()));
    for bad in [(0, 100), (1, 0)] {
        let (count, within) = (bad.0, Duration::from_millis(bad.1));
        let min_replicas = Some(MinReplicas { count, within });
        let options = RedisOptions { min_replicas, ..RedisOptions::default() };
        let error = RedisBackend::connect(&server.url(), options).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
}
