//! A server whose clock is wrong, or jumps.

use palisade::backend::LockBackend;
use palisade::protocol::{Acquire, Acquired, Inspection, Released, Renewed};
use palisade::{ErrorKind, Mode::Exclusive as X};

use crate::redis_asks::{Client, P0, connect, key, renew, tokens};
use crate::support::{RedisServer, ServerClock};

const MINUTE: i64 = 60;

#[tokio::test]
async fn tokens_grow_and_locks_are_handed_over_whatever_the_clock_does() {
    let server = RedisServer::start_with_clock(ServerClock::new());
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let mut last = None;
    for ahead in [0, 5, 0, -5, 30, -30, 0].map(|minutes| minutes * MINUTE) {
        server.clock().set_ahead(ahead);
        let seconds: i64 = server.command(&["TIME"]).lines().next().unwrap().parse().unwrap();
        let here = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs().cast_signed();
        assert!((seconds - here - ahead).abs() < 10, "the clock is not where it should be");
        let asks = [client.ask(&[("k", X)]), client.ask(&[("k", X)])];
        let token = tokens(&redis.acquire(&asks[0]).await.unwrap())[0];
        assert!(last < Some(token), "{ahead} s: {token} after {last:?}");
        assert!(matches!(redis.acquire(&asks[1]).await.unwrap(), Acquired::Queued { .. }));
        assert_eq!(renew(&redis, &asks[0], false).await, Renewed::Held(None));
        assert_eq!(redis.release(&asks[0].part).await.unwrap(), Released::Released);
        let Renewed::Held(Some(grant)) = renew(&redis, &asks[1], true).await else {
            panic!("not handed over, {ahead} s")
        };
        assert!(grant.tokens[0] > token);
        last = Some(grant.tokens[0]);
        assert_eq!(redis.release(&asks[1].part).await.unwrap(), Released::Released);
    }
}

#[tokio::test]
async fn a_jump_forward_costs_the_lease_and_its_holder_is_told() {
    let server = RedisServer::start_with_clock(ServerClock::new());
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let held = client.ask(&[("k", X)]);
    let token = tokens(&redis.acquire(&held).await.unwrap())[0];
    server.clock().set_ahead(5 * MINUTE);
    assert_eq!(renew(&redis, &held, false).await, Renewed::Lost);
    assert_eq!(redis.inspect(P0, &key("k")).await.unwrap(), Inspection::default());
    assert!(tokens(&redis.acquire(&client.ask(&[("k", X)])).await.unwrap())[0] > token);
}

#[tokio::test]
async fn a_jump_backward_keeps_leases_and_lines() {
    let server = RedisServer::start_with_clock(ServerClock::new());
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let (held, next) = (client.ask(&[("k", X)]), client.ask(&[("k", X)]));
    redis.acquire(&held).await.unwrap();
    redis.acquire(&next).await.unwrap();
    server.clock().set_ahead(-5 * MINUTE);
    assert_eq!(renew(&redis, &held, false).await, Renewed::Held(None));
    assert!(matches!(renew(&redis, &next, true).await, Renewed::Queued { .. }));
    assert_eq!(redis.release(&held.part).await.unwrap(), Released::Released);
    assert!(matches!(renew(&redis, &next, true).await, Renewed::Held(Some(_))));
}

#[tokio::test]
async fn a_clock_that_was_days_ahead_is_named_and_nothing_is_granted_below_its_tokens() {
    let server = RedisServer::start_with_clock(ServerClock::new());
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    server.clock().set_ahead(3 * 24 * 60 * MINUTE);
    let ask = client.ask(&[("k", X)]);
    tokens(&redis.acquire(&ask).await.unwrap());
    server.clock().set_ahead(0);
    let error = redis.acquire(&client.ask(&[("other", X)])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:?}");
    assert!(error.to_string().contains("clock"), "{error}");
    let tried = Acquire { wait: false, ..client.ask(&[("k", X)]) };
    assert_eq!(redis.acquire(&tried).await.unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(redis.release(&ask.part).await.unwrap(), Released::Released);
}
