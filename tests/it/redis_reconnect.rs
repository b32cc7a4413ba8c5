//! How a connection is found again: how often anybody tries, how long a call waits, and what a
//! server that makes no sense costs.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use palisade::Mode::Exclusive as X;
use palisade::backend::{LockBackend, RedisBackend, RedisOptions};
use palisade::protocol::{Acquired, Released, Renewed};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use crate::redis_asks::{Client, P0, SOON, key, renew, tokens};
use crate::support::{Directory, Events, Fault, Harm, Point, Proxy, RedisServer, Side, wait_until};

const A_MOMENT: Duration = Duration::from_millis(150);

fn patient(reconnect_for: Duration) -> RedisOptions {
    RedisOptions { reconnect_for, ..RedisOptions::default() }
}

/// The most attempts within `time` for a patience of a second: some at first, then at most eight a
/// second, since each delay is at least half of a quarter of the patience.
fn most(time: Duration) -> usize {
    16 + 8 * (1 + usize::try_from(time.as_secs()).unwrap())
}

/// Calls of many tasks, each at once after the one before, for three seconds.
async fn besiege(redis: &RedisBackend, client: &Client) -> Duration {
    let begun = Instant::now();
    let calls = (0..50).map(|_| async {
        while begun.elapsed() < Duration::from_secs(3) {
            redis.acquire(&client.ask(&[("k", X)])).await.unwrap_err();
        }
    });
    join_all(calls).await;
    begun.elapsed()
}

/// Asks until it is granted. Returns how long that took.
async fn served_again(redis: &RedisBackend, client: &Client) -> Duration {
    let begun = Instant::now();
    wait_until("the server is found again", SOON, async || {
        redis.acquire(&client.ask(&[("k", X)])).await.is_ok()
    })
    .await;
    begun.elapsed()
}

#[tokio::test]
async fn a_dead_server_is_tried_a_few_times_a_second_and_found_soon_when_it_is_back() {
    let server = RedisServer::start();
    let redis = RedisBackend::connect(&server.url(), RedisOptions::default()).await.unwrap();
    let client = Client::of(&redis).await;
    let events = Events::collect();
    server.kill();
    let time = besiege(&redis, &client).await;
    let attempts = events.with("connecting to Redis").len();
    println!("{attempts} attempts in {time:?} at a dead port");
    assert!((3..=most(time)).contains(&attempts), "{attempts} in {time:?}");
    server.restart_empty();
    println!("back after {:?}", served_again(&redis, &client).await);
}

#[tokio::test]
async fn a_call_that_is_kept_and_not_polled_holds_up_nobody() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.port()).await;
    let url = format!("redis://127.0.0.1:{}", proxy.port());
    let redis = RedisBackend::connect(&url, patient(SOON)).await.unwrap();
    let client = Client::of(&redis).await;
    let held = client.ask(&[("held", X)]);
    tokens(&redis.acquire(&held).await.unwrap());
    proxy.sever(true);
    let (kept, other) = (client.ask(&[("k", X)]), client.ask(&[("l", X)]));
    let mut kept = std::pin::pin!(redis.acquire(&kept));
    for _ in 0..3 {
        // Long enough to be where it waits for a connection.
        assert!(timeout(A_MOMENT, &mut kept).await.is_err());
    }
    proxy.sever(false);
    assert_eq!(timeout(SOON, renew(&redis, &held, false)).await.unwrap(), Renewed::Held(None));
    tokens(&timeout(SOON, redis.acquire(&other)).await.unwrap().unwrap());
    tokens(&timeout(SOON, kept).await.unwrap().unwrap());
}

/// A server that accepts connections, reads something, says `answer`, and closes them. Counts them.
async fn brief_server(answer: &'static [u8]) -> (u16, Arc<AtomicUsize>, AbortOnDropHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let task = tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            counted.fetch_add(1, Ordering::SeqCst);
            if !answer.is_empty() {
                let _ = client.read(&mut [0; 512]).await;
                let _ = client.write_all(answer).await;
            }
        }
    });
    (port, count, AbortOnDropHandle::new(task))
}

#[tokio::test]
async fn a_server_that_accepts_and_closes_sees_no_storm_and_each_call_has_one_deadline() {
    let (port, count, _task) = brief_server(b"").await;
    let begun = Instant::now();
    let url = format!("redis://127.0.0.1:{port}");
    let error = RedisBackend::connect(&url, patient(Duration::from_secs(2))).await.unwrap_err();
    let (time, count) = (begun.elapsed(), count.load(Ordering::SeqCst));
    println!("{count} connections in {time:?}");
    assert!(error.is_unavailable(), "{error:?}");
    assert!(time > Duration::from_secs(1) && time < SOON, "{time:?}");
    assert!((3..=most(time)).contains(&count), "{count} in {time:?}");
}

#[tokio::test]
async fn a_server_that_greets_and_closes_at_the_first_call_sees_no_storm() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.port()).await;
    let url = format!("redis://127.0.0.1:{}", proxy.port());
    let redis = RedisBackend::connect(&url, RedisOptions::default()).await.unwrap();
    let client = Client::of(&redis).await;
    // The proxy looks for each of them in all that passes, so not many more than are met.
    for _ in 0..100 {
        proxy.plan("EVALSHA", Fault::At(Point::Request, Harm::Cut));
    }
    let events = Events::collect();
    let time = besiege(&redis, &client).await;
    let attempts = events.with("connecting to Redis").len();
    println!("{attempts} attempts in {time:?} that were of no use");
    assert!((3..=most(time)).contains(&attempts), "{attempts} in {time:?}");
    proxy.calm();
    served_again(&redis, &client).await;
}

#[tokio::test]
async fn what_is_not_a_redis_server_is_named() {
    for answer in [&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..], b"\0\xff\xfe garbage \r\n\r\n", b"*"] {
        let (port, _, _task) = brief_server(answer).await;
        let url = format!("redis://127.0.0.1:{port}");
        let patience = patient(Duration::from_millis(300));
        let error = RedisBackend::connect(&url, patience).await.unwrap_err();
        assert!(error.is_unavailable(), "{error:?}");
        println!("{error}");
    }
}

#[tokio::test]
async fn a_connection_that_breaks_or_turns_to_noise_costs_a_second_copy_and_no_more() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.port()).await;
    let url = format!("redis://127.0.0.1:{}", proxy.port());
    let redis = RedisBackend::connect(&url, patient(SOON)).await.unwrap();
    let client = Client::of(&redis).await;
    for harm in [Harm::Reset, Harm::Cut, Harm::HalfOpen(Side::Client), Harm::Garbage(7)] {
        for at in [Point::Request, Point::Reply, Point::HalfReply] {
            let ask = client.ask(&[("k", X)]);
            proxy.plan("EVALSHA", Fault::At(at, harm));
            let (acquired, ()) = tokio::join!(timeout(SOON, redis.acquire(&ask)), async {
                proxy.happened().await;
                // Noise may be the beginning of an answer that never ends: then somebody has to
                // give up before the connection is.
                for _ in 0..10 {
                    let _ = timeout(A_MOMENT, redis.ping()).await;
                }
            });
            tokens(&acquired.unwrap().unwrap());
            assert_eq!(redis.inspect(P0, &key("k")).await.unwrap().holders.len(), 1);
            assert_eq!(redis.release(&ask.part).await.unwrap(), Released::Released, "{harm:?}");
        }
    }
    println!("{:?}", proxy.struck());
}

#[tokio::test]
async fn a_byte_a_second_and_a_half_open_connection_hold_a_call_no_longer_than_it_wants() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.port()).await;
    let url = format!("redis://127.0.0.1:{}", proxy.port());
    let redis = RedisBackend::connect(&url, RedisOptions::default()).await.unwrap();
    let client = Client::of(&redis).await;
    for harm in [Harm::Trickle(Duration::from_secs(1)), Harm::HalfOpen(Side::Server), Harm::Drop] {
        let ask = client.ask(&[("k", X)]);
        proxy.plan("EVALSHA", Fault::At(Point::Reply, harm));
        let begun = Instant::now();
        assert!(timeout(A_MOMENT, redis.acquire(&ask)).await.is_err(), "{harm:?}");
        assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
        // It was not settled: the same request is sent again until it is.
        let mut copies = 1;
        let acquired = loop {
            copies += 1;
            if let Ok(acquired) = timeout(Duration::from_secs(1), redis.acquire(&ask)).await {
                break acquired.unwrap();
            }
            assert!(copies < 20, "the connection is never replaced");
        };
        println!("{harm:?}: {copies} copies");
        tokens(&acquired);
        assert_eq!(redis.inspect(P0, &key("k")).await.unwrap().holders.len(), 1);
        assert_eq!(redis.release(&ask.part).await.unwrap(), Released::Released);
    }
}

#[tokio::test]
async fn a_server_behind_a_socket_file_is_found_again_too() {
    let directory = Directory::new();
    let path = directory.path().join("redis.sock");
    let path = path.to_str().unwrap();
    let server = RedisServer::start_with(&["--unixsocket", path]);
    let redis = RedisBackend::connect(&format!("unix://{path}"), patient(SOON)).await.unwrap();
    let client = Client::of(&redis).await;
    let (held, channel) = (client.ask(&[("k", X)]), format!("palisade:c:{}", client.id));
    tokens(&redis.acquire(&held).await.unwrap());
    server.restart_empty();
    assert_eq!(renew(&redis, &held, false).await, Renewed::Lost);
    wait_until("the channel is subscribed to", SOON, async || {
        server.command(&["PUBSUB", "NUMSUB", &channel]).ends_with("\n1")
    })
    .await;
    let (first, second) = (client.ask(&[("k", X)]), client.ask(&[("k", X)]));
    tokens(&redis.acquire(&first).await.unwrap());
    assert!(matches!(redis.acquire(&second).await.unwrap(), Acquired::Queued { .. }));
    redis.release(&first.part).await.unwrap();
    assert!(client.was_told(&second));
}
