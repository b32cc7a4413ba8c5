//! What the Redis driver does for one or two clients.

use std::time::Duration;

use palisade::backend::{LockBackend, RedisBackend, RedisOptions};
use palisade::protocol::{Acquire, Acquired, Inspection, Released, Renewed, Standing};
use palisade::{ErrorKind, FencingToken, Mode, RequestId};

use crate::redis_asks::{Client, P0, SOON, ask, connect, key, lease, left, renew, tokens};
use crate::support::{RedisServer, wait_until};

use Mode::{Exclusive as X, Shared as S};

#[tokio::test]
async fn a_release_hands_the_key_to_the_next_in_line_and_tells_it() {
    let server = RedisServer::start();
    let (one, two) = (connect(&server).await, connect(&server).await);
    let (a, b) = (Client::of(&one).await, Client::of(&two).await);
    let (first, second) = (a.ask(&[("k", X)]), b.ask(&[("k", X)]));
    let token = tokens(&one.acquire(&first).await.unwrap())[0];
    let queued = two.acquire(&second).await.unwrap();
    assert!(matches!(queued, Acquired::Queued { position: 0, .. }), "{queued:?}");
    assert_eq!(one.release(&first.part).await.unwrap(), Released::Released);
    wait_until("the grant is pushed", SOON, async || b.was_told(&second)).await;
    let over = b.pushed().remove(0);
    assert_eq!(over.owner, second.part.owner);
    assert!(over.grant.tokens[0] > token);
    assert_eq!(renew(&two, &second, true).await, Renewed::Held(Some(over.grant)));
    assert_eq!(one.release(&first.part).await.unwrap(), Released::Gone);
    assert_eq!(two.release(&second.part).await.unwrap(), Released::Released);
    assert_eq!(left(&server), [""; 0]);
}

#[tokio::test]
async fn every_name_that_is_a_key_can_be_locked_waited_for_shared_and_shown() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let long = "ы".repeat(256);
    let names =
        ["a{b}c", "}{", "two words", "a\nb\r\n", "k:x", "palisade:{0}:t", "鍵", "a;b,c*d", &long];
    for name in names {
        let (first, second) = (client.ask(&[(name, S)]), client.ask(&[(name, S), ("other", X)]));
        let third = client.ask(&[(name, X), ("z", X)]);
        tokens(&redis.acquire(&first).await.unwrap());
        tokens(&redis.acquire(&second).await.unwrap());
        redis.acquire(&third).await.unwrap();
        let seen = redis.inspect(P0, &key(name)).await.unwrap();
        assert_eq!((seen.holders.len(), seen.waiters.len()), (2, 1), "{name:?}");
        redis.release(&first.part).await.unwrap();
        redis.release(&second.part).await.unwrap();
        let Renewed::Held(Some(grant)) = renew(&redis, &third, true).await else {
            panic!("{name}")
        };
        assert_eq!(grant.tokens.len(), 2);
        redis.release(&third.part).await.unwrap();
        assert_eq!(left(&server), [""; 0], "{name:?}");
    }
}

#[tokio::test]
async fn a_copy_that_arrives_after_its_cancel_is_not_granted_though_the_keys_are_free() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let ask = client.ask(&[("a", X), ("b", X)]);
    redis.cancel(&ask.part).await.unwrap();
    assert_eq!(redis.acquire(&ask).await.unwrap(), Acquired::Cancelled);
    let other = client.ask(&[("a", X)]);
    tokens(&redis.acquire(&other).await.unwrap());
    assert_eq!(redis.acquire(&ask).await.unwrap(), Acquired::Cancelled, "also where one is taken");
    redis.release(&other.part).await.unwrap();
    let tombstone = left(&server);
    assert_eq!(tombstone.len(), 1, "{tombstone:?}");
    let ttl: i64 = server.command(&["PTTL", &tombstone[0]]).parse().unwrap();
    assert!((1..=30_000).contains(&ttl), "{ttl}");
}

#[tokio::test]
async fn a_grant_lasts_as_long_as_its_lease_and_not_longer() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let short = Acquire { lease: lease(150), ..client.ask(&[("a", X), ("b", S)]) };
    let renewed = Acquire { lease: lease(150), ..client.ask(&[("c", X)]) };
    tokens(&redis.acquire(&short).await.unwrap());
    tokens(&redis.acquire(&renewed).await.unwrap());
    let (next, after) = (client.ask(&[("b", X)]), client.ask(&[("b", S)]));
    assert!(matches!(redis.acquire(&next).await.unwrap(), Acquired::Queued { .. }));
    assert!(matches!(redis.acquire(&after).await.unwrap(), Acquired::Queued { .. }));
    wait_until("the lease has lapsed", SOON, async || {
        assert_eq!(renew(&redis, &renewed, false).await, Renewed::Held(None));
        matches!(renew(&redis, &next, true).await, Renewed::Held(Some(_)))
    })
    .await;
    assert_eq!(renew(&redis, &short, false).await, Renewed::Lost);
    assert_eq!(redis.release(&short.part).await.unwrap(), Released::Gone);
    redis.release(&next.part).await.unwrap();
    assert!(client.was_told(&after));
}

#[tokio::test]
async fn a_renewal_never_shortens_a_lease() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let asks = [client.ask(&[("a", X)]), client.ask(&[("b", S)]), client.ask(&[("b", S)])];
    for ask in &asks {
        tokens(&redis.acquire(ask).await.unwrap());
    }
    redis.acquire(&client.ask(&[("b", X)])).await.unwrap();
    for ask in &asks {
        let short = Acquire { lease: lease(10), ..ask.clone() };
        assert_eq!(renew(&redis, &short, false).await, Renewed::Held(None));
        let seen = redis.inspect(P0, &ask.part.wants[0].key).await.unwrap();
        let least = seen.holders.iter().map(|holder| holder.expires_in).min().unwrap();
        assert!(least > Duration::from_secs(50), "{least:?}");
    }
}

#[tokio::test]
async fn who_lost_one_of_its_keys_keeps_none_of_them() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let both = client.ask(&[("a", X), ("b", X)]);
    tokens(&redis.acquire(&both).await.unwrap());
    let waiter = client.ask(&[("b", X)]);
    redis.acquire(&waiter).await.unwrap();
    server.command(&["DEL", "palisade:{0}:k:a"]);
    assert_eq!(renew(&redis, &both, false).await, Renewed::Lost);
    assert!(matches!(renew(&redis, &waiter, true).await, Renewed::Held(Some(_))));
    assert_eq!(redis.inspect(P0, &key("a")).await.unwrap(), Inspection::default());
}

#[tokio::test]
async fn metadata_is_shown_for_holders_and_waiters_and_goes_with_them() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let told = |text: &str| Some(text.to_owned());
    let holder = Acquire { metadata: told("host 1\n\u{0}"), ..client.ask(&[("k", X)]) };
    let waiter = Acquire { metadata: told(""), ..client.ask(&[("k", X), ("l", X)]) };
    tokens(&redis.acquire(&holder).await.unwrap());
    redis.acquire(&waiter).await.unwrap();
    let seen = redis.inspect(P0, &key("k")).await.unwrap();
    assert_eq!(seen.holders[0].metadata, holder.metadata);
    assert_eq!(seen.waiters[0].metadata, waiter.metadata);
    assert_eq!(renew(&redis, &holder, false).await, Renewed::Held(None));
    redis.release(&holder.part).await.unwrap();
    let seen = redis.inspect(P0, &key("k")).await.unwrap();
    assert_eq!(seen.holders[0].metadata, waiter.metadata);
    assert!(seen.waiters.is_empty());
    redis.release(&waiter.part).await.unwrap();
    assert_eq!(left(&server), [""; 0]);
}

#[tokio::test]
async fn tokens_exceed_the_floor_and_never_the_clock_by_a_day() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let first = client.ask(&[("a", X)]);
    let token = tokens(&redis.acquire(&first).await.unwrap())[0].get();
    let hour = 3_600_000_000;
    let floor = FencingToken::new(token + hour);
    let above = Acquire { floor, ..client.ask(&[("b", X), ("c", X)]) };
    let acquired = redis.acquire(&above).await.unwrap();
    assert_eq!(tokens(&acquired), [FencingToken::new(token + hour + 1).unwrap(); 2]);
    let waiter = Acquire { floor: FencingToken::new(token + 2 * hour), ..client.ask(&[("a", X)]) };
    redis.acquire(&waiter).await.unwrap();
    redis.release(&first.part).await.unwrap();
    let Renewed::Held(Some(grant)) = renew(&redis, &waiter, true).await else { panic!() };
    assert_eq!(grant.tokens[0].get(), token + 2 * hour + 1);
    let far = Acquire { floor: FencingToken::new(token + 25 * hour), ..client.ask(&[("d", X)]) };
    assert_eq!(redis.acquire(&far).await.unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(redis.inspect(P0, &key("d")).await.unwrap(), Inspection::default());
}

#[tokio::test]
async fn tokens_grow_through_a_restart_that_forgot_everything() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let before = client.ask(&[("k", X)]);
    let token = tokens(&redis.acquire(&before).await.unwrap())[0];
    server.restart_empty();
    let after = client.ask(&[("k", X)]);
    assert!(tokens(&redis.acquire(&after).await.unwrap())[0] > token);
    assert_eq!(renew(&redis, &before, false).await, Renewed::Lost);
}

#[tokio::test]
async fn a_thousand_keys_are_one_set() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let names: Vec<_> = (0..1000).map(|n| format!("key {n}")).collect();
    let wants: Vec<_> = names.iter().map(|name| (name.as_str(), X)).collect();
    let (first, second) = (client.ask(&wants), client.ask(&wants));
    assert_eq!(tokens(&redis.acquire(&first).await.unwrap()).len(), 1000);
    assert!(matches!(redis.acquire(&second).await.unwrap(), Acquired::Queued { .. }));
    assert_eq!(renew(&redis, &first, false).await, Renewed::Held(None));
    assert_eq!(redis.release(&first.part).await.unwrap(), Released::Released);
    wait_until("the grant is pushed", SOON, async || client.was_told(&second)).await;
    assert_eq!(client.pushed()[0].grant.tokens.len(), 1000);
    redis.release(&second.part).await.unwrap();
    assert_eq!(left(&server), [""; 0]);
}

#[tokio::test]
async fn many_leases_are_renewed_in_one_call_each_for_itself() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let mut asks = Vec::new();
    for n in 0..250 {
        let ask = client.ask(&[(&format!("key {n}"), X), (&format!("read {}", n % 3), S)]);
        tokens(&redis.acquire(&ask).await.unwrap());
        asks.push(ask);
    }
    redis.release(&asks[7].part).await.unwrap();
    let renewals: Vec<_> = asks.iter().map(|ask| crate::redis_asks::renewal(ask, false)).collect();
    let renewed = redis.renew(P0, &renewals).await.unwrap();
    for (n, answer) in renewed.iter().enumerate() {
        assert_eq!(*answer, if n == 7 { Renewed::Lost } else { Renewed::Held(None) }, "{n}");
    }
}

#[tokio::test]
async fn a_client_with_another_number_of_partitions_is_refused() {
    let server = RedisServer::start();
    let four = RedisOptions { partitions: 4, ..RedisOptions::default() };
    let redis = RedisBackend::connect(&server.url(), four).await.unwrap();
    assert_eq!(redis.capabilities().partitions, 4);
    let error = RedisBackend::connect(&server.url(), RedisOptions::default()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("4 partitions"), "{error}");
    let client = Client::of(&redis).await;
    let mut ask = client.ask(&[("a", X)]);
    ask.part.partition = key("a").partition(4);
    tokens(&redis.acquire(&ask).await.unwrap());
    ask.part.partition.0 = 4;
    ask.part.request = RequestId::next();
    assert_eq!(redis.acquire(&ask).await.unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[tokio::test]
async fn an_incremental_request_passes_the_line_and_never_joins_it() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let holder = client.ask(&[("b", X)]);
    let waiter = client.ask(&[("a", X), ("b", X)]);
    redis.acquire(&holder).await.unwrap();
    redis.acquire(&waiter).await.unwrap();
    let more = Acquire {
        standing: Standing::Incremental,
        ..ask(client.id, holder.part.owner, &[("a", X)])
    };
    tokens(&redis.acquire(&more).await.unwrap());
    let other = Acquire { standing: Standing::Incremental, ..client.ask(&[("a", X)]) };
    let busy = redis.acquire(&other).await.unwrap();
    let Acquired::Busy { key, holders, waiters } = busy else { panic!("{busy:?}") };
    assert_eq!((key.as_str(), holders, waiters), ("a", vec![holder.part.owner], true));
}

#[tokio::test]
async fn a_waiter_that_reads_meanwhile_is_alone_only_when_it_reads_no_more() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let (reader, writer) = (client.ask(&[("k", S)]), client.ask(&[("k", X)]));
    let token = tokens(&redis.acquire(&reader).await.unwrap())[0];
    assert!(matches!(redis.acquire(&writer).await.unwrap(), Acquired::Queued { .. }));
    // Another process that was handed the owner's id reads beside the first reader.
    let same = Acquire { wait: false, ..ask(client.id, writer.part.owner, &[("k", S)]) };
    let beside = tokens(&redis.acquire(&same).await.unwrap())[0];
    redis.release(&reader.part).await.unwrap();
    assert!(matches!(renew(&redis, &writer, true).await, Renewed::Queued { .. }));
    let other = Acquire { wait: false, ..client.ask(&[("k", S)]) };
    assert!(matches!(redis.acquire(&other).await.unwrap(), Acquired::Busy { .. }));
    redis.release(&same.part).await.unwrap();
    let Renewed::Held(Some(grant)) = renew(&redis, &writer, true).await else { panic!() };
    assert!(token < beside && beside < grant.tokens[0]);
    assert!(matches!(redis.acquire(&other).await.unwrap(), Acquired::Busy { .. }));
    redis.release(&writer.part).await.unwrap();
    assert_eq!(left(&server), [""; 0]);
}

#[tokio::test]
async fn an_acquire_that_is_sent_again_lasts_a_whole_lease_from_then() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let (first, second) = (client.ask(&[("k", X)]), client.ask(&[("k", X)]));
    redis.acquire(&first).await.unwrap();
    redis.acquire(&second).await.unwrap();
    redis.release(&first.part).await.unwrap();
    let left = async || redis.inspect(P0, &key("k")).await.unwrap().holders[0].expires_in;
    assert!(left().await <= second.lease.claim(), "handed over, for a claim");
    tokens(&redis.acquire(&second).await.unwrap());
    assert!(left().await > second.lease.claim(), "sent again");
}
