//! Redis users who may do what palisade needs, and nothing else.

use futures_util::future::join_all;
use palisade::backend::{LockBackend, RedisBackend, RedisOptions};
use palisade::protocol::{Acquire, Acquired, Released, Renewed};
use palisade::{ErrorKind, Mode};

use crate::redis_asks::{Client, P0, SOON, connect, key, renew, tokens};
use crate::redis_differential;
use crate::support::{Proxy, RedisServer, wait_until};

use Mode::{Exclusive as X, Shared as S};

/// With all that is special in a URL, and as it stands there.
const PASSWORD: (&str, &str) = ("p@ss:w/rd#%?& é", "p%40ss%3Aw%2Frd%23%25%3F%26%20%C3%A9");

/// Makes the user `locks`, with what the library says that it needs. Returns its URL at `port`.
async fn minimal_user(server: &RedisServer, port: u16) -> String {
    server.command(&["ACL", "SETUSER", "nobody", "reset", "on", ">secret"]);
    let nobody = format!("redis://nobody:secret@127.0.0.1:{}", server.port());
    let denied = RedisBackend::connect(&nobody, RedisOptions::default()).await.unwrap_err();
    assert_eq!(denied.kind(), ErrorKind::Denied, "{denied:?}");
    let text = denied.to_string();
    let rules = text.split_once("it needs ").unwrap().1.split_whitespace();
    let password = format!(">{}", PASSWORD.0);
    let user = ["ACL", "SETUSER", "locks", "reset", "on", &password];
    server.command(&user.into_iter().chain(rules).collect::<Vec<_>>());
    format!("redis://locks:{}@127.0.0.1:{port}", PASSWORD.1)
}

#[tokio::test]
async fn everything_works_for_a_user_with_the_rules_that_an_error_recommends() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.port()).await;
    let url = minimal_user(&server, proxy.port()).await;
    let options = RedisOptions {
        reconnect_for: SOON,
        amnesia_guard: Some(std::time::Duration::from_secs(1)),
        ..RedisOptions::default()
    };
    let redis = RedisBackend::connect(&url, options).await.unwrap();
    let client = Client::of(&redis).await;
    redis.ping().await.unwrap();
    let first = client.ask(&[("k", X)]);
    wait_until("the guard is over", SOON, async || redis.acquire(&first).await.is_ok()).await;
    // A line, with metadata and a push; readers of several owners; a cancel.
    let next = Acquire { metadata: Some("m".into()), ..client.ask(&[("k", X), ("l", S)]) };
    let readers: Vec<_> = (0..3).map(|_| client.ask(&[("k", S), ("r", S)])).collect();
    redis.acquire(&next).await.unwrap();
    for reader in &readers {
        assert!(matches!(redis.acquire(reader).await.unwrap(), Acquired::Queued { .. }));
    }
    redis.release(&first.part).await.unwrap();
    wait_until("the grant is pushed", SOON, async || client.was_told(&next)).await;
    assert!(matches!(renew(&redis, &next, true).await, Renewed::Held(Some(_))));
    redis.cancel(&next.part).await.unwrap();
    for reader in &readers {
        assert!(matches!(renew(&redis, reader, true).await, Renewed::Held(Some(_))));
    }
    assert_eq!(redis.inspect(P0, &key("k")).await.unwrap().holders.len(), 3);
    for reader in &readers {
        assert_eq!(redis.release(&reader.part).await.unwrap(), Released::Released);
    }
    // A crowd; and a new connection, which ends the one before it.
    let crowd: Vec<_> = (0..200).map(|n| client.ask(&[(&format!("{n}"), X)])).collect();
    let all = join_all(crowd.iter().map(|ask| redis.acquire(ask))).await;
    all.iter().for_each(|acquired| assert_eq!(tokens(acquired.as_ref().unwrap()).len(), 1));
    proxy.plan("PING", crate::support::Fault::LoseReply);
    redis.ping().await.unwrap();
    assert_eq!(proxy.struck()["lose reply"], 1);
    wait_until("the connection before it is closed", SOON, async || {
        server.command(&["CLIENT", "LIST"]).matches("user=locks").count() == 1
    })
    .await;
    let all = join_all(crowd.iter().map(|ask| redis.release(&ask.part))).await;
    assert!(all.iter().all(|released| *released.as_ref().unwrap() == Released::Released));
    redis.unsubscribe(client.id);
    assert_eq!(server.command(&["ACL", "LOG"]).matches("locks").count(), 0, "nothing was refused");
}

#[tokio::test]
async fn that_user_reaches_nothing_else() {
    let server = RedisServer::start();
    minimal_user(&server, server.port()).await;
    for command in [
        &["SET", "other", "1"][..],
        &["GET", "other"],
        &["PUBLISH", "other", "1"],
        &["FLUSHALL"],
        &["FLUSHDB"],
        &["SWAPDB", "0", "1"],
        &["KEYS", "*"],
        &["CONFIG", "GET", "*"],
        &["CLIENT", "PAUSE", "1000"],
        &["DEBUG", "SLEEP", "0"],
        &["SHUTDOWN"],
        &["ACL", "LIST"],
        &["MONITOR"],
        &["REPLICAOF", "NO", "ONE"],
    ] {
        let dry = [&["ACL", "DRYRUN", "locks"], command].concat();
        let answer = server.command(&dry);
        assert!(answer.contains("no permissions") || answer.contains("has no"), "{answer}");
    }
}

#[test]
fn its_answers_are_those_of_the_memory_backend() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let server = RedisServer::start();
    let redis = runtime.block_on(async {
        let url = minimal_user(&server, server.port()).await;
        RedisBackend::connect(&url, RedisOptions::default()).await.unwrap()
    });
    redis_differential::compare(&runtime, &server, &redis, 40, 40, false);
}

#[tokio::test]
async fn a_password_that_was_changed_is_refused_at_the_next_connection_and_at_once() {
    let server = RedisServer::start();
    let url = minimal_user(&server, server.port()).await;
    let options = RedisOptions { reconnect_for: 3 * SOON, ..RedisOptions::default() };
    let redis = RedisBackend::connect(&url, options).await.unwrap();
    let client = Client::of(&redis).await;
    server.command(&["ACL", "SETUSER", "locks", "resetpass", ">changed"]);
    server.command(&["CLIENT", "KILL", "USER", "locks"]);
    let begun = std::time::Instant::now();
    // The first call may have been on its way when the connection ended: then it may have been
    // carried out, for all that is known.
    let mut error = redis.acquire(&client.ask(&[("k", X)])).await.unwrap_err();
    if error.is_unavailable() {
        error = redis.acquire(&client.ask(&[("k", X)])).await.unwrap_err();
    }
    assert_eq!(error.kind(), ErrorKind::Denied, "{error:?}");
    assert!(begun.elapsed() < 2 * SOON);
    let text = format!("{error} {error:?} {redis:?}");
    for secret in [PASSWORD.0, PASSWORD.1, "changed"] {
        assert!(!text.contains(secret), "{text}");
    }
    connect(&server).await;
}
