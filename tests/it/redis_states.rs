//! A Redis server that refuses, or is in a state that may pass.

use std::error::Error as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use palisade::backend::{LockBackend, RedisBackend, RedisOptions};
use palisade::protocol::{Inspection, Released, Renewed};
use palisade::{Error, ErrorKind, Mode};

use crate::redis_asks::{Client, P0, SOON, connect, key, renew, tokens};
use crate::support::{RedisServer, wait_until};

use Mode::{Exclusive as X, Shared as S};

const PASSWORD: &str = "pa55-w0rd";

/// The error and all that is behind it, as text.
fn in_full(error: &Error) -> String {
    let mut text = format!("{error} {error:?}");
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(&format!(" {cause} {cause:?}"));
        source = cause.source();
    }
    text
}

async fn refusal(url: &str) -> Error {
    let options = RedisOptions { reconnect_for: SOON, ..RedisOptions::default() };
    let error = RedisBackend::connect(url, options).await.unwrap_err();
    assert!(!in_full(&error).contains(PASSWORD), "{}", in_full(&error));
    error
}

/// A backend that loses its patience soon.
async fn impatient(server: &RedisServer) -> RedisBackend {
    let options =
        RedisOptions { reconnect_for: Duration::from_millis(200), ..RedisOptions::default() };
    RedisBackend::connect(&server.url(), options).await.unwrap()
}

#[tokio::test]
async fn a_url_that_cannot_be_one_is_refused_before_any_connection_and_not_repeated() {
    for url in [
        "",
        "redis",
        "http://127.0.0.1",
        "redis://:pa55-w0rd@127.0.0.1:notaport",
        "redis://user:pa55-w0rd@127.0.0.1/notadb",
        "redis://",
        "redis://:pa55-w0rd@0.0.0.0:6379",
        "rediss://:pa55-w0rd@127.0.0.1",
    ] {
        let begun = Instant::now();
        let error = refusal(url).await;
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{url}: {error:?}");
        assert!(begun.elapsed() < Duration::from_secs(5));
    }
    for none in [
        RedisOptions { partitions: 0, ..RedisOptions::default() },
        RedisOptions { reconnect_for: Duration::ZERO, ..RedisOptions::default() },
    ] {
        let error = RedisBackend::connect("redis://127.0.0.1:1", none).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
}

#[tokio::test]
async fn a_socket_file_and_a_database_number_are_part_of_the_url() {
    let server = RedisServer::start();
    let url = format!("{}/3", server.url());
    let redis = RedisBackend::connect(&url, RedisOptions::default()).await.unwrap();
    let client = Client::of(&redis).await;
    tokens(&redis.acquire(&client.ask(&[("k", X)])).await.unwrap());
    assert!(server.command(&["INFO", "keyspace"]).contains("db3:keys=3"));
    let path = std::env::temp_dir().join(format!("palisade-{}.sock", fastrand::u64(..)));
    let path = path.to_str().unwrap();
    let server = RedisServer::start_with(&["--unixsocket", path]);
    for scheme in ["unix", "redis+unix"] {
        let url = format!("{scheme}://{path}?db=1");
        let redis = RedisBackend::connect(&url, RedisOptions::default()).await.unwrap();
        let client = Client::of(&redis).await;
        tokens(&redis.acquire(&client.ask(&[(scheme, X)])).await.unwrap());
    }
    assert!(server.command(&["INFO", "keyspace"]).contains("db1:keys=4"));
}

#[tokio::test]
async fn missing_and_wrong_credentials_are_denied_at_once_and_never_shown() {
    let server = RedisServer::start_with(&["--requirepass", PASSWORD]);
    let begun = Instant::now();
    let port = server.port();
    for url in [
        format!("redis://127.0.0.1:{port}"),
        format!("redis://:not-{PASSWORD}@127.0.0.1:{port}"),
        format!("redis://nobody:{PASSWORD}@127.0.0.1:{port}"),
    ] {
        let error = refusal(&url).await;
        assert_eq!(error.kind(), ErrorKind::Denied, "{error:?}");
    }
    assert!(begun.elapsed() < SOON / 2, "not tried again");
    let redis = connect(&server).await;
    redis.ping().await.unwrap();
    assert!(!format!("{redis:?}").contains(PASSWORD));
}

#[tokio::test]
async fn a_user_without_the_permission_is_denied_and_told_which_it_needs() {
    let server = RedisServer::start();
    let url = format!("redis://bob:{PASSWORD}@127.0.0.1:{}", server.port());
    let grant = |rules: &[&str]| {
        let password = format!(">{PASSWORD}");
        let mut command = vec!["ACL", "SETUSER", "bob", "reset", "on", &password];
        command.extend(rules);
        server.command(&command);
    };
    grant(&["~other:*", "&*", "+@all"]);
    assert_eq!(refusal(&url).await.kind(), ErrorKind::Denied);
    grant(&["~palisade:*", "&*", "+@all", "-evalsha", "-eval"]);
    let redis = RedisBackend::connect(&url, RedisOptions::default()).await.unwrap();
    let client = Client::of(&redis).await;
    let error = redis.acquire(&client.ask(&[("k", X)])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Denied);
    assert!(error.to_string().contains("palisade:*"), "{error}");
    assert!(!in_full(&error).contains(PASSWORD));
    grant(&["~palisade:*", "&other", "+@all"]);
    let redis = RedisBackend::connect(&url, RedisOptions::default()).await.unwrap();
    let denied = redis.subscribe(palisade::ClientId::random(), Arc::new(|_| {})).await;
    assert_eq!(denied.unwrap_err().kind(), ErrorKind::Denied);
    let needed = ["~palisade:*", "+@read", "+@write", "+@scripting", "+@pubsub", "+@connection"];
    grant(&[&needed[..], &["&palisade:c:*"]].concat());
    let redis = RedisBackend::connect(&url, RedisOptions::default()).await.unwrap();
    let denied = redis.acquire(&client.ask(&[("k", X)])).await.unwrap_err();
    assert_eq!(denied.kind(), ErrorKind::Denied, "within a script: {denied:?}");
    // What the error recommends is enough, for two who wait for each other too.
    for rule in &needed {
        assert!(denied.to_string().contains(rule), "{denied}");
    }
    grant(&[&needed[..], &["&palisade:c:*", "+time", "+client|kill"]].concat());
    let redis = RedisBackend::connect(&url, RedisOptions::default()).await.unwrap();
    let client = Client::of(&redis).await;
    let (first, second) = (client.ask(&[("k", X)]), client.ask(&[("k", X)]));
    tokens(&redis.acquire(&first).await.unwrap());
    redis.acquire(&second).await.unwrap();
    redis.release(&first.part).await.unwrap();
    assert!(client.was_told(&second));
    // Who may not publish loses the push, not the hand-over.
    let third = client.ask(&[("k", X)]);
    redis.acquire(&third).await.unwrap();
    server.command(&["ACL", "SETUSER", "bob", "-publish"]);
    assert_eq!(redis.release(&second.part).await.unwrap(), Released::Released);
    assert!(matches!(renew(&redis, &third, true).await, Renewed::Held(Some(_))));
}

#[tokio::test]
async fn a_server_without_memory_grants_nothing_and_still_renews_releases_and_hands_over() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let (alone, first, next) =
        (client.ask(&[("a", X), ("b", S)]), client.ask(&[("k", X)]), client.ask(&[("k", X)]));
    let readers: Vec<_> = (0..3).map(|_| client.ask(&[("r", S)])).collect();
    let (cancelled, entered) = (client.ask(&[("c", X)]), client.ask(&[("e", X)]));
    for ask in [&alone, &first, &next, &cancelled, &entered].into_iter().chain(&readers) {
        redis.acquire(ask).await.unwrap();
    }
    let mut again = entered.clone();
    again.part.request = palisade::RequestId::next();
    tokens(&redis.acquire(&again).await.unwrap());
    server.command(&["CONFIG", "SET", "maxmemory", "1"]);
    for keys in [&[("free", X)][..], &[("k", X)], &[("r", S)]] {
        let error = redis.acquire(&client.ask(keys)).await.unwrap_err();
        assert!(error.is_unavailable(), "{error:?}");
        assert!(error.to_string().contains("maxmemory"), "{error}");
    }
    assert_eq!(redis.inspect(P0, &key("free")).await.unwrap(), Inspection::default());
    assert_eq!(renew(&redis, &alone, false).await, Renewed::Held(None));
    assert_eq!(renew(&redis, &readers[1], false).await, Renewed::Held(None));
    assert!(matches!(renew(&redis, &next, true).await, Renewed::Queued { .. }));
    assert_eq!(redis.release(&alone.part).await.unwrap(), Released::Released);
    assert_eq!(redis.release(&again.part).await.unwrap(), Released::Released);
    assert_eq!(redis.release(&readers[0].part).await.unwrap(), Released::Released);
    redis.cancel(&cancelled.part).await.unwrap();
    redis.release(&first.part).await.unwrap();
    assert!(client.was_told(&next));
    // A client that comes new to a full server may look and clear up, too.
    server.command(&["CONFIG", "SET", "maxmemory", "0"]);
    server.command(&["DEL", "palisade:partitions"]);
    server.command(&["CONFIG", "SET", "maxmemory", "1"]);
    let other = connect(&server).await;
    assert_eq!(other.release(&next.part).await.unwrap(), Released::Released);
}

#[tokio::test]
async fn a_server_that_became_a_replica_is_named_and_used_again_when_it_is_one_no_more() {
    let server = RedisServer::start();
    let redis = impatient(&server).await;
    let client = Client::of(&redis).await;
    let held = client.ask(&[("k", X)]);
    tokens(&redis.acquire(&held).await.unwrap());
    server.command(&["REPLICAOF", "127.0.0.1", "1"]);
    let error = redis.acquire(&client.ask(&[("a", X)])).await.unwrap_err();
    assert!(error.is_unavailable() && error.to_string().contains("READONLY"), "{error:?}");
    let error = redis.release(&held.part).await.unwrap_err();
    assert!(error.is_unavailable() && error.to_string().contains("READONLY"), "{error:?}");
    server.command(&["CONFIG", "SET", "replica-serve-stale-data", "no"]);
    let error = redis.acquire(&client.ask(&[("a", X)])).await.unwrap_err();
    assert!(error.is_unavailable() && error.to_string().contains("MASTERDOWN"), "{error:?}");
    server.command(&["REPLICAOF", "NO", "ONE"]);
    tokens(&redis.acquire(&client.ask(&[("a", X)])).await.unwrap());
    assert_eq!(redis.release(&held.part).await.unwrap(), Released::Released);
}

#[tokio::test]
async fn a_server_with_too_few_replicas_is_named() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let held = client.ask(&[("k", X)]);
    tokens(&redis.acquire(&held).await.unwrap());
    server.command(&["CONFIG", "SET", "min-replicas-to-write", "1"]);
    for error in [
        redis.acquire(&client.ask(&[("a", X)])).await.unwrap_err(),
        redis.release(&held.part).await.unwrap_err(),
    ] {
        assert!(error.is_unavailable() && error.to_string().contains("NOREPLICAS"), "{error:?}");
    }
    assert_eq!(redis.inspect(P0, &key("k")).await.unwrap().holders.len(), 1);
}

#[tokio::test]
async fn scripts_that_the_server_forgot_are_sent_again() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    server.command(&["SCRIPT", "FLUSH"]);
    let ask = client.ask(&[("k", X)]);
    tokens(&redis.acquire(&ask).await.unwrap());
    server.command(&["SCRIPT", "FLUSH"]);
    assert_eq!(renew(&redis, &ask, false).await, Renewed::Held(None));
    server.command(&["SCRIPT", "FLUSH"]);
    assert_eq!(redis.inspect(P0, &key("k")).await.unwrap().holders.len(), 1);
    assert_eq!(redis.release(&ask.part).await.unwrap(), Released::Released);
    redis.cancel(&ask.part).await.unwrap();
    server.restart_empty();
    tokens(&redis.acquire(&client.ask(&[("k", X)])).await.unwrap());
}

#[tokio::test]
async fn a_server_that_is_busy_with_a_foreign_script_is_named_and_waited_for() {
    let server = Arc::new(RedisServer::start_with(&["--busy-reply-threshold", "20"]));
    let (redis, patient) = (impatient(&server).await, connect(&server).await);
    let client = Client::of(&redis).await;
    let busy = Arc::clone(&server);
    let busy = std::thread::spawn(move || busy.try_command(&["EVAL", "while true do end", "0"]));
    wait_until("the server says that it is busy", SOON, async || {
        server.try_command(&["PING"]).is_err_and(|error| error.starts_with("BUSY"))
    })
    .await;
    let error = redis.acquire(&client.ask(&[("k", X)])).await.unwrap_err();
    assert!(error.is_unavailable() && error.to_string().contains("BUSY"), "{error:?}");
    let ask = client.ask(&[("k", X)]);
    let (acquired, ()) = tokio::join!(patient.acquire(&ask), async {
        server.command(&["SCRIPT", "KILL"]);
    });
    tokens(&acquired.unwrap());
    busy.join().unwrap().unwrap_err();
}

#[tokio::test]
async fn a_server_that_is_still_loading_is_waited_for() {
    // 40 000 keys at 50 µs each: at least two seconds.
    let args = ["--key-load-delay", "50", "--loading-process-events-interval-bytes", "1024"];
    let server = RedisServer::start_with(&args);
    server.command(&["EVAL", "for i = 1, 40000 do redis.call('SET', i, i) end", "0"]);
    server.command(&["SAVE"]);
    // It starts with what was saved.
    server.restart_empty();
    let options =
        RedisOptions { reconnect_for: Duration::from_millis(500), ..RedisOptions::default() };
    let error = RedisBackend::connect(&server.url(), options).await.unwrap_err();
    assert!(error.is_unavailable() && error.to_string().contains("LOADING"), "{error:?}");
    let options = RedisOptions { reconnect_for: SOON, ..RedisOptions::default() };
    let redis = RedisBackend::connect(&server.url(), options).await.unwrap();
    let client = Client::of(&redis).await;
    tokens(&redis.acquire(&client.ask(&[("k", X)])).await.unwrap());
}
