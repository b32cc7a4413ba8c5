//! A Redis server that refuses, or is in a state that may pass.
//!
//! | what the server says or does | what the caller sees | tests, if not here |
//! |---|---|---|
//! | `NOAUTH`, `WRONGPASS` | `Denied` at once, no password in it | and `redis_users` |
//! | `NOPERM`, also in a script | `Denied` at once, with the rules it needs | and `redis_users` |
//! | `OOM` | acquire `Unavailable`; release, renew, cancel, hand-over work | |
//! | `READONLY`, `MASTERDOWN` | a new connection, the same request; then `Unavailable` | |
//! | `LOADING`, `BUSY` | waited for; then `Unavailable` | |
//! | `NOSCRIPT` | nothing: the text is sent | |
//! | `NOREPLICAS` | `Unavailable`; a release says that the lock is left to expire | |
//! | `MISCONF` | `Unavailable`, with the remedy | |
//! | `CLUSTERDOWN` | waited for; then `Unavailable` | |
//! | `MOVED` | `InvalidInput`: a node of a cluster | |
//! | `WRONGTYPE`, `nan`, 2^53 at our keys | `Corrupt`, left as it is | `redis_corrupt` |
//! | noise, a byte a second, a reset, half-open | a copy on a new connection | `redis_reconnect` |
//! | nothing: stopped, killed | `Unavailable` within the patience | `redis_outage` |
//! | a clock minutes or days off | tokens grow; `Corrupt` beyond a day | `redis_clock` |
//! | no memory after a restart | `Lost`; with a guard, nothing is granted | `redis_memory` |
//! | a certificate that is not accepted | `Denied` | `redis_tls` |
//! | a version before 7.0 | `Unavailable` at once, with the one it needs | |

use std::error::Error as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use palisade::backend::{LockBackend, RedisBackend, RedisOptions};
use palisade::protocol::{Inspection, Released, Renewed};
use palisade::{Error, ErrorKind, Mode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::AbortOnDropHandle;

use crate::redis_asks::{Client, P0, SOON, connect, key, renew, tokens};
use crate::support::{Directory, Events, RedisServer, wait_until};

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
        "rediss://:pa55-w0rd@",
        "rediss://:pa55-w0rd@127.0.0.1/#insecure",
        "redis://user:pa55-w0rd/odd@127.0.0.1",
        "redis://user:pa55-w0rd?odd@127.0.0.1",
        "redis://user:pa55-w0rd#odd@127.0.0.1",
        "redis://user:pa55-w0rd%ff@127.0.0.1",
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
    let events = Events::collect();
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
    assert!(!events.with("").is_empty());
    assert!(events.with(PASSWORD).is_empty(), "{:?}", events.with(PASSWORD));
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
    let needed = [
        "~palisade:*",
        "+@read",
        "+@write",
        "+@scripting",
        "+@pubsub",
        "+@connection",
        "-@dangerous",
    ];
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
    let refused = redis.acquire(&client.ask(&[("a", X)])).await.unwrap_err();
    let unreleased = redis.release(&held.part).await.unwrap_err();
    for error in [&refused, &unreleased] {
        assert!(error.is_unavailable() && error.to_string().contains("NOREPLICAS"), "{error:?}");
    }
    assert!(unreleased.to_string().contains("left to expire"), "{unreleased}");
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

#[tokio::test]
async fn a_request_outlives_a_change_of_roles_and_is_granted_once() {
    let server = RedisServer::start();
    let options = RedisOptions { reconnect_for: SOON, ..RedisOptions::default() };
    let redis = RedisBackend::connect(&server.url(), options).await.unwrap();
    let client = Client::of(&redis).await;
    server.command(&["REPLICAOF", "127.0.0.1", "1"]);
    server.command(&["CONFIG", "RESETSTAT"]);
    let ask = client.ask(&[("k", X)]);
    let refused = || server.command(&["INFO", "errorstats"]).contains("errorstat_READONLY");
    let (acquired, ()) = tokio::join!(redis.acquire(&ask), async {
        wait_until("it was refused", SOON, async || refused()).await;
        server.command(&["REPLICAOF", "NO", "ONE"]);
    });
    tokens(&acquired.unwrap());
    assert_eq!(redis.inspect(P0, &key("k")).await.unwrap().holders.len(), 1);
}

#[tokio::test]
async fn a_script_that_cannot_be_killed_is_waited_for_and_named() {
    let server = Arc::new(RedisServer::start_with(&["--busy-reply-threshold", "20"]));
    let redis = impatient(&server).await;
    let client = Client::of(&redis).await;
    let busy = Arc::clone(&server);
    let script = "redis.call('SET', 'x', 1) while true do end";
    let busy = std::thread::spawn(move || busy.try_command(&["EVAL", script, "0"]));
    wait_until("the script cannot be killed", SOON, async || {
        server.try_command(&["SCRIPT", "KILL"]).is_err_and(|error| error.starts_with("UNKILLABLE"))
    })
    .await;
    let begun = Instant::now();
    let error = redis.acquire(&client.ask(&[("k", X)])).await.unwrap_err();
    assert!(error.is_unavailable() && error.to_string().contains("BUSY"), "{error:?}");
    // New clients hear the same.
    let error = refusal_within(&server.url(), Duration::from_millis(200)).await;
    assert!(error.is_unavailable() && error.to_string().contains("BUSY"), "{error:?}");
    assert!(begun.elapsed() < SOON);
    server.restart_empty();
    tokens(&redis.acquire(&client.ask(&[("k", X)])).await.unwrap());
    busy.join().unwrap().unwrap_err();
}

async fn refusal_within(url: &str, reconnect_for: Duration) -> Error {
    let options = RedisOptions { reconnect_for, ..RedisOptions::default() };
    RedisBackend::connect(url, options).await.unwrap_err()
}

#[tokio::test]
async fn scripts_that_are_forgotten_all_the_time_cost_nobody_anything() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    // Alone, and with so many at once that they share calls.
    for tasks in [4, 64] {
        let work = (0..tasks).map(|task| {
            let (redis, client) = (&redis, &client);
            async move {
                for round in 0..20 {
                    let ask = client.ask(&[(&format!("{task} {round}"), X), ("shared", S)]);
                    tokens(&redis.acquire(&ask).await.unwrap());
                    assert_eq!(renew(redis, &ask, false).await, Renewed::Held(None));
                    assert_eq!(redis.release(&ask.part).await.unwrap(), Released::Released);
                }
            }
        });
        let flush = async {
            loop {
                server.command(&["SCRIPT", "FLUSH"]);
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        server.command(&["CONFIG", "RESETSTAT"]);
        tokio::select! { _ = join_all(work) => {}, () = flush => {} }
        let errors = server.command(&["INFO", "errorstats"]);
        println!("{tasks} tasks: {}", errors.trim());
        assert!(errors.contains("errorstat_NOSCRIPT"), "{errors}");
    }
}

#[tokio::test]
async fn a_server_that_cannot_save_is_named() {
    let directory = Directory::new();
    let target = directory.path().join("missing");
    std::fs::create_dir(&target).unwrap();
    let server = RedisServer::start_with(&["--enable-protected-configs", "yes"]);
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    server.command(&["CONFIG", "SET", "dir", target.to_str().unwrap()]);
    std::fs::remove_dir(&target).unwrap();
    server.command(&["CONFIG", "SET", "save", "3600 1000000"]);
    server.command(&["SET", "x", "1"]);
    server.command(&["BGSAVE"]);
    wait_until("saving has failed", SOON, async || {
        server.command(&["INFO", "persistence"]).contains("rdb_last_bgsave_status:err")
    })
    .await;
    let error = redis.acquire(&client.ask(&[("k", X)])).await.unwrap_err();
    assert!(error.is_unavailable() && error.to_string().contains("MISCONF"), "{error:?}");
}

#[tokio::test]
async fn a_node_of_a_cluster_is_named_as_one() {
    let nodes = [(); 2].map(|()| RedisServer::start_with(&["--cluster-enabled", "yes"]));
    // No slot is served yet.
    let error = refusal_within(&nodes[0].url(), Duration::from_millis(300)).await;
    assert!(error.is_unavailable() && error.to_string().contains("CLUSTERDOWN"), "{error:?}");
    // Slots that another node serves.
    nodes[1].command(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]);
    let port = nodes[1].port().to_string();
    let bus = (nodes[1].port() + 10_000).to_string();
    nodes[0].command(&["CLUSTER", "MEET", "127.0.0.1", &port, &bus]);
    wait_until("the nodes know each other", 3 * SOON, async || {
        nodes.iter().all(|node| node.command(&["CLUSTER", "INFO"]).contains("cluster_state:ok"))
    })
    .await;
    let error = refusal_within(&nodes[0].url(), Duration::from_millis(300)).await;
    assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error:?}");
    assert!(error.to_string().contains("cluster"), "{error}");
    // The one that serves all slots is as good as a server of its own.
    let redis = connect(&nodes[1]).await;
    let client = Client::of(&redis).await;
    let (first, second) = (client.ask(&[("k", X)]), client.ask(&[("k", X)]));
    tokens(&redis.acquire(&first).await.unwrap());
    redis.acquire(&second).await.unwrap();
    redis.release(&first.part).await.unwrap();
    assert!(client.was_told(&second));
}

/// Between a client and a server, which it makes say that it is of version 6. Returns its port.
async fn aged(server: &RedisServer) -> (u16, AbortOnDropHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (port, target) = (listener.local_addr().unwrap().port(), server.port());
    let task = tokio::spawn(async move {
        let (client, _) = listener.accept().await.unwrap();
        let server = TcpStream::connect(("127.0.0.1", target)).await.unwrap();
        let (mut from_client, mut to_client) = client.into_split();
        let (mut from_server, mut to_server) = server.into_split();
        let back = async {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(n @ 1..) = from_server.read(&mut buffer).await {
                let name = b"redis_version:";
                if let Some(at) = buffer[..n].windows(name.len()).position(|text| text == name) {
                    buffer[at + name.len()] = b'6';
                }
                to_client.write_all(&buffer[..n]).await.unwrap();
            }
        };
        tokio::select! {
            _ = tokio::io::copy(&mut from_client, &mut to_server) => {}
            () = back => {}
        }
    });
    (port, AbortOnDropHandle::new(task))
}

#[tokio::test]
async fn a_server_of_an_old_version_is_named_at_once() {
    let server = RedisServer::start();
    let (port, _task) = aged(&server).await;
    // It accepts one connection: whoever tries again would wait for as long as its patience lasts.
    let error = refusal_within(&format!("redis://127.0.0.1:{port}"), 3 * SOON).await;
    assert!(error.is_unavailable() && error.to_string().contains("7.0"), "{error:?}");
    assert_eq!(server.command(&["KEYS", "*"]), "", "nothing was written");
}
