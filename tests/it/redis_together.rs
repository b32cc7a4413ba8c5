//! Many operations under way at once, which share calls at the server.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::join_all;
use palisade::backend::LockBackend;
use palisade::protocol::{Acquire, Acquired, Released, Renewed};
use palisade::{ErrorKind, FencingToken, Mode};
use tokio::task::JoinSet;

use crate::redis_asks::{Client, P0, connect, key, left, renew, tokens};
use crate::support::RedisServer;

use Mode::{Exclusive as X, Shared as S};

/// How often each command was called, by clients or by scripts, since the last reset.
fn calls(server: &RedisServer, command: &str) -> usize {
    let stats = server.command(&["INFO", "commandstats"]);
    let line = stats.lines().find(|line| line.starts_with(&format!("cmdstat_{command}:")));
    line.map_or(0, |line| {
        let calls = line.split("calls=").nth(1).unwrap().split(',').next().unwrap();
        calls.parse().unwrap()
    })
}

fn many(client: &Client, n: usize, keys: usize) -> Vec<Acquire> {
    let names: Vec<Vec<String>> =
        (0..n).map(|n| (0..keys).map(|key| format!("{n}:{key}")).collect()).collect();
    let wants = names.iter().map(|names| -> Vec<(&str, Mode)> {
        let modes = [X, S].into_iter().cycle();
        names.iter().map(String::as_str).zip(modes).collect()
    });
    wants.map(|wants| client.ask(&wants)).collect()
}

async fn all(redis: &dyn LockBackend, asks: &[Acquire]) -> Vec<FencingToken> {
    let acquired = join_all(asks.iter().map(|ask| redis.acquire(ask))).await;
    acquired
        .into_iter()
        .zip(asks)
        .map(|(acquired, ask)| {
            let acquired = acquired.unwrap();
            assert_eq!(tokens(&acquired).len(), ask.part.wants.len());
            tokens(&acquired)[0]
        })
        .collect()
}

#[tokio::test]
async fn a_crowd_shares_calls_and_each_of_it_has_a_token_of_its_own() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let asks = many(&client, 200, 3);
    let last = tokens(&redis.acquire(&client.ask(&[("last", X)])).await.unwrap())[0];
    server.command(&["CONFIG", "RESETSTAT"]);
    let mut granted = all(&redis, &asks).await;
    granted.sort();
    assert!(granted[0] > last && granted.windows(2).all(|pair| pair[0] < pair[1]), "{granted:?}");
    for ask in &asks {
        assert_eq!(renew(&redis, ask, false).await, Renewed::Held(None));
    }
    let released = join_all(asks.iter().map(|ask| redis.release(&ask.part))).await;
    assert!(released.iter().all(|released| *released.as_ref().unwrap() == Released::Released));
    let sent = calls(&server, "evalsha") - asks.len();
    assert!(sent < 100, "{sent} calls for 400 operations");
    assert_eq!(left(&server), ["palisade:{0}:k:last"]);
    // Twice is once.
    let again = join_all(asks.iter().map(|ask| redis.release(&ask.part))).await;
    assert!(again.iter().all(|released| *released.as_ref().unwrap() == Released::Gone));
}

#[tokio::test]
async fn whoever_is_in_the_way_is_met_as_if_the_operation_came_alone() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let held = client.ask(&[("7:1", X)]);
    tokens(&redis.acquire(&held).await.unwrap());
    server.command(&["RPUSH", "palisade:{0}:k:9:0", "foreign"]);
    let cancelled = many(&client, 64, 3);
    redis.cancel(&cancelled[3].part).await.unwrap();
    let answers = join_all(cancelled.iter().map(|ask| redis.acquire(ask))).await;
    for (n, answer) in answers.iter().enumerate() {
        match (n, answer) {
            (3, Ok(Acquired::Cancelled)) | (7, Ok(Acquired::Queued { .. })) => {}
            (9, Err(error)) => assert_eq!(error.kind(), ErrorKind::Corrupt),
            (_, Ok(Acquired::Granted(_))) => assert!(![3, 7, 9].contains(&n)),
            (n, answer) => panic!("{n}: {answer:?}"),
        }
    }
    // Nothing of those that were refused is left.
    assert!(redis.inspect(P0, &key("9:1")).await.unwrap().holders.is_empty());
    assert!(redis.inspect(P0, &key("7:0")).await.unwrap().holders.is_empty());
    let others = cancelled.iter().filter(|ask| ask.part != cancelled[7].part);
    let crowd = others.map(|ask| &ask.part).chain([&held.part]);
    let released = join_all(crowd.map(|part| redis.release(part))).await;
    assert_eq!(*released.last().unwrap().as_ref().unwrap(), Released::Released);
    assert!(client.was_told(&cancelled[7]), "the release of one in a crowd hands over");
}

#[tokio::test]
async fn a_crowd_survives_lost_scripts_and_a_full_memory() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let asks = many(&client, 100, 2);
    server.command(&["SCRIPT", "FLUSH"]);
    all(&redis, &asks).await;
    server.command(&["CONFIG", "SET", "maxmemory", "1"]);
    let others = many(&client, 100, 1);
    let refused = join_all(others.iter().map(|ask| redis.acquire(ask)));
    let released = join_all(asks.iter().map(|ask| redis.release(&ask.part)));
    let (refused, released) = tokio::join!(refused, released);
    for answer in refused {
        assert_eq!(answer.unwrap_err().kind(), ErrorKind::Unavailable);
    }
    assert!(released.iter().all(|released| *released.as_ref().unwrap() == Released::Released));
    assert_eq!(left(&server), [""; 0]);
}

#[tokio::test]
async fn those_who_leave_a_crowd_are_cancelled_and_the_others_get_their_answers() {
    let server = RedisServer::start();
    let redis = Arc::new(connect(&server).await);
    let client = Client::of(&*redis).await;
    let asks = many(&client, 120, 1);
    let mut crowd = JoinSet::new();
    for ask in asks.clone() {
        let redis = Arc::clone(&redis);
        crowd.spawn(async move {
            let leaves = fastrand::bool();
            let patience =
                if leaves { Duration::from_micros(300) } else { Duration::from_secs(60) };
            let answer = tokio::time::timeout(patience, redis.acquire(&ask)).await;
            if answer.is_err() {
                redis.cancel(&ask.part).await.unwrap();
            }
            (ask.part, answer.is_ok())
        });
    }
    let ended = crowd.join_all().await;
    let (held, left_early): (Vec<_>, Vec<_>) = ended.into_iter().partition(|(_, held)| *held);
    for (part, _) in &left_early {
        assert!(redis.inspect(P0, &part.wants[0].key).await.unwrap().holders.is_empty());
    }
    let released = join_all(held.iter().map(|(part, _)| redis.release(part))).await;
    assert!(released.iter().all(|released| *released.as_ref().unwrap() == Released::Released));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_over_few_keys_never_has_two_holders_and_tokens_grow() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let server = RedisServer::start();
    let locks = palisade::connect(&server.url()).await.unwrap();
    let holders = Arc::new(Mutex::new((HashSet::new(), HashMap::new())));
    let mut tasks = JoinSet::new();
    for task in 0..64 {
        let (locks, holders) = (locks.clone(), Arc::clone(&holders));
        let mut rng = fastrand::Rng::with_seed(seed.wrapping_add(task));
        tasks.spawn(async move {
            for _ in 0..40 {
                let keys: Vec<_> = (0..rng.usize(1..4)).map(|_| rng.u8(..48).to_string()).collect();
                let guard = locks.lock_all(&keys).acquire().await.unwrap();
                let enter = |enter: bool| {
                    let mut all = holders.lock().unwrap();
                    for held in guard.keys() {
                        if enter {
                            let last = all.1.insert(held.key.clone(), held.token);
                            assert!(last < Some(held.token), "{held:?} after {last:?}");
                            assert!(all.0.insert(held.key.clone()), "{held:?} has two holders");
                        } else {
                            all.0.remove(&held.key);
                        }
                    }
                };
                enter(true);
                tokio::task::yield_now().await;
                enter(false);
                guard.release().await.unwrap();
            }
        });
    }
    tasks.join_all().await;
    assert_eq!(left(&server), [""; 0]);
}
