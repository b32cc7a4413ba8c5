//! Values that palisade did not write, at keys of palisade: named, and left as they are.

use palisade::backend::LockBackend;
use palisade::protocol::{Acquire, Acquired, Inspection, Released, Renewed};
use palisade::{Error, ErrorKind, Mode};

use crate::redis_asks::{Client, P0, connect, key, left, renew, renewal, tokens};
use crate::support::RedisServer;

use Mode::{Exclusive as X, Shared as S};

const COUNTER: &str = "palisade:{0}:t";

/// Commands that put a foreign value at a key; `KEY` stands for it.
const FOREIGN_TYPES: [&[&str]; 4] = [
    &["RPUSH", "KEY", "1"],
    &["HSET", "KEY", "a", "1"],
    &["SADD", "KEY", "1"],
    &["XADD", "KEY", "*", "a", "1"],
];

fn put(server: &RedisServer, redis_key: &str, command: &[&str]) {
    server.command(&["DEL", redis_key]);
    let command: Vec<_> =
        command.iter().map(|part| if *part == "KEY" { redis_key } else { part }).collect();
    server.command(&command);
}

/// All that can be seen of a key.
fn dump(server: &RedisServer, redis_key: &str) -> (String, String) {
    (server.command(&["DUMP", redis_key]), server.command(&["TTL", redis_key]))
}

fn assert_names(error: &Error, redis_key: &str) {
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?}");
    assert!(error.to_string().contains(&format!("{redis_key:?}")), "{error}");
}

#[tokio::test]
async fn a_token_counter_that_cannot_be_ours_stops_grants_and_is_never_overwritten() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let holder = client.ask(&[("taken", X)]);
    let token = tokens(&redis.acquire(&holder).await.unwrap())[0].get();
    let tomorrow = (token + 25 * 3_600_000_000).to_string();
    let values = [
        "",
        "abc",
        "nan",
        "-nan",
        "inf",
        "1e300",
        "1e15",
        "0x10",
        "1.5",
        "-5",
        " 1",
        "1\n",
        "9007199254740992",
        "9007199254740991",
        "99999999999999999999",
        &tomorrow,
    ];
    let strings: Vec<Vec<&str>> = values.iter().map(|value| vec!["SET", "KEY", value]).collect();
    let all = strings.iter().map(Vec::as_slice).chain(FOREIGN_TYPES);
    for command in all {
        put(&server, COUNTER, command);
        let before = dump(&server, COUNTER);
        for ask in [
            client.ask(&[("a", X), ("b", S)]),
            client.ask(&[("a", X), ("taken", X)]),
            Acquire { wait: false, ..client.ask(&[("taken", X)]) },
            Acquire { metadata: Some("m".into()), ..client.ask(&[("a", X)]) },
        ] {
            let error = redis.acquire(&ask).await.unwrap_err();
            assert_names(&error, COUNTER);
        }
        assert_eq!(dump(&server, COUNTER), before, "{command:?}");
        assert_eq!(left(&server), ["palisade:{0}:k:taken"], "{command:?}");
        assert_eq!(renew(&redis, &holder, false).await, Renewed::Held(None), "{command:?}");
    }
    server.command(&["DEL", COUNTER]);
    tokens(&redis.acquire(&client.ask(&[("a", X)])).await.unwrap());
}

#[tokio::test]
async fn a_release_happens_though_no_token_can_be_given_to_the_next() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let (holder, waiter) = (client.ask(&[("k", X)]), client.ask(&[("k", X)]));
    let other = client.ask(&[("other", X)]);
    for ask in [&holder, &waiter, &other] {
        redis.acquire(ask).await.unwrap();
    }
    server.command(&["SET", COUNTER, "nan"]);
    assert_names(&redis.release(&holder.part).await.unwrap_err(), COUNTER);
    assert_eq!(redis.release(&holder.part).await.unwrap(), Released::Gone);
    let seen = redis.inspect(P0, &key("k")).await.unwrap();
    assert_eq!((seen.holders.len(), seen.waiters.len()), (0, 1));
    // The lease that shares the call is renewed all the same.
    let both = [renewal(&waiter, true), renewal(&other, false)];
    let renewed = redis.renew(P0, &both).await.unwrap();
    assert!(matches!(renewed[0], Renewed::Queued { .. }), "{renewed:?}");
    assert_eq!(renewed[1], Renewed::Held(None));
    assert!(!client.was_told(&waiter));
    server.command(&["DEL", COUNTER]);
    assert!(matches!(renew(&redis, &waiter, true).await, Renewed::Held(Some(_))));
    assert!(client.was_told(&waiter));
}

#[tokio::test]
async fn a_foreign_value_where_a_key_is_held_is_named_and_nothing_else_is_taken() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let id = "0".repeat(48);
    let strings = [
        "foreign".to_owned(),
        String::new(),
        "#x".to_owned(),
        "-".to_owned(),
        format!("-x{id}"),
        format!("-z{id}:1"),
        format!("-x{id}0:1"),
        format!("-x{id}:1"), // has no TTL: a lease that never ends is not ours
        format!("={}:1", &id[..32]),
        format!("={}:1;x1:2", &id[..32]),
        format!("={}:1;x{}:2;", &id[..32], &id[..16]),
    ];
    let strings: Vec<Vec<&str>> = strings.iter().map(|value| vec!["SET", "KEY", value]).collect();
    for command in strings.iter().map(Vec::as_slice).chain(FOREIGN_TYPES) {
        let redis_key = "palisade:{0}:k:b";
        put(&server, redis_key, command);
        let before = dump(&server, redis_key);
        for mode in [X, S] {
            let ask = Acquire {
                metadata: Some("m".into()),
                ..client.ask(&[("a", X), ("b", mode), ("c", S)])
            };
            for _ in 0..2 {
                let error = redis.acquire(&ask).await.unwrap_err();
                assert_names(&error, redis_key);
                assert_eq!(error.key(), Some(&key("b")), "{command:?}");
            }
            redis.release(&ask.part).await.unwrap_err();
            redis.cancel(&ask.part).await.unwrap_err();
        }
        let error = redis.inspect(P0, &key("b")).await.unwrap_err();
        assert_names(&error, redis_key);
        assert_eq!(dump(&server, redis_key), before, "{command:?}");
        let rest: Vec<_> = left(&server).into_iter().filter(|name| !name.contains(":x:")).collect();
        assert_eq!(rest, [redis_key], "{command:?}");
    }
}

#[tokio::test]
async fn foreign_values_beside_a_key_are_named_before_anything_is_written() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    for (name, modes) in [("q", [X, X]), ("h", [S, S]), ("d", [S, S])] {
        let first = client.ask(&[("k", modes[0])]);
        tokens(&redis.acquire(&first).await.unwrap());
        let redis_key = format!("palisade:{{0}}:{name}:k");
        put(&server, &redis_key, &["SET", "KEY", "foreign"]);
        let second = client.ask(&[("a", X), ("k", modes[1])]);
        let error = redis.acquire(&second).await.unwrap_err();
        assert_names(&error, &redis_key);
        assert_eq!(error.key(), Some(&key("k")));
        assert_eq!(server.command(&["GET", &redis_key]), "foreign");
        assert_eq!(redis.release(&first.part).await.unwrap(), Released::Released);
        assert_eq!(left(&server), [redis_key.as_str()]);
        server.command(&["DEL", &redis_key]);
    }
    for name in ["w", "e"] {
        let redis_key = format!("palisade:{{0}}:{name}");
        put(&server, &redis_key, &["SET", "KEY", "foreign"]);
        let first = client.ask(&[("k", X)]);
        tokens(&redis.acquire(&first).await.unwrap());
        let error = redis.acquire(&client.ask(&[("a", X), ("k", X)])).await.unwrap_err();
        assert_names(&error, &redis_key);
        assert_eq!(renew(&redis, &first, false).await, Renewed::Held(None));
        redis.release(&first.part).await.unwrap();
        assert_eq!(server.command(&["GET", &redis_key]), "foreign");
        assert_eq!(left(&server), [redis_key.as_str()]);
        server.command(&["DEL", &redis_key]);
    }
}

#[tokio::test]
async fn a_holder_whose_key_was_overwritten_loses_it_alone_and_frees_the_rest() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let (lost, released) = (client.ask(&[("a", X), ("b", X)]), client.ask(&[("c", X), ("d", X)]));
    let healthy = client.ask(&[("e", X)]);
    for ask in [&lost, &released, &healthy] {
        tokens(&redis.acquire(ask).await.unwrap());
    }
    server.command(&["SET", "palisade:{0}:k:b", "foreign"]);
    server.command(&["SET", "palisade:{0}:k:d", "foreign"]);
    let both = [renewal(&lost, false), renewal(&healthy, false)];
    assert_eq!(redis.renew(P0, &both).await.unwrap(), [Renewed::Lost, Renewed::Held(None)]);
    assert_eq!(redis.inspect(P0, &key("a")).await.unwrap(), Inspection::default());
    let error = redis.release(&released.part).await.unwrap_err();
    assert_names(&error, "palisade:{0}:k:d");
    assert_eq!(redis.inspect(P0, &key("c")).await.unwrap(), Inspection::default());
    for name in ["b", "d"] {
        assert_eq!(server.command(&["GET", &format!("palisade:{{0}}:k:{name}")]), "foreign");
    }
}

#[tokio::test]
async fn a_reader_that_cannot_be_recorded_beside_another_waits_until_it_can() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let (reader, writer, next) =
        (client.ask(&[("k", S)]), client.ask(&[("k", X)]), client.ask(&[("k", S)]));
    for ask in [&reader, &writer, &next] {
        redis.acquire(ask).await.unwrap();
    }
    let redis_key = "palisade:{0}:h:k";
    server.command(&["SET", redis_key, "foreign"]);
    redis.cancel(&writer.part).await.unwrap();
    assert!(matches!(renew(&redis, &next, true).await, Renewed::Queued { .. }));
    let seen = redis.inspect(P0, &key("k")).await.unwrap();
    assert_eq!((seen.holders.len(), seen.waiters.len()), (1, 1));
    assert_eq!(server.command(&["GET", redis_key]), "foreign");
    server.command(&["DEL", redis_key]);
    assert!(matches!(renew(&redis, &next, true).await, Renewed::Held(Some(_))));
    assert_eq!(redis.inspect(P0, &key("k")).await.unwrap().holders.len(), 2);
}

#[tokio::test]
async fn a_waiter_whose_record_was_deleted_does_not_block_the_line() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let asks = [client.ask(&[("k", X)]), client.ask(&[("k", X)]), client.ask(&[("k", S)])];
    for ask in &asks {
        redis.acquire(ask).await.unwrap();
    }
    let id = format!("{}{}", asks[1].part.owner.as_uuid().simple(), asks[1].part.request);
    assert_eq!(server.command(&["HDEL", "palisade:{0}:w", &id]), "1");
    redis.release(&asks[0].part).await.unwrap();
    assert!(client.was_told(&asks[2]));
    assert!(!client.was_told(&asks[1]));
    redis.release(&asks[2].part).await.unwrap();
    let next = client.ask(&[("k", X)]);
    assert!(matches!(redis.acquire(&next).await.unwrap(), Acquired::Granted(_)));
}

#[tokio::test]
async fn a_number_of_partitions_that_is_none_is_named() {
    for command in [&["SET", "KEY", "many"][..], &["SET", "KEY", "0"], &["RPUSH", "KEY", "1"]] {
        let server = RedisServer::start();
        put(&server, "palisade:partitions", command);
        let options = palisade::backend::RedisOptions::default();
        let refused = palisade::backend::RedisBackend::connect(&server.url(), options).await;
        assert_names(&refused.unwrap_err(), "palisade:partitions");
    }
}
