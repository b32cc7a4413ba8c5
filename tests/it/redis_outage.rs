//! A Redis server that breaks off, stalls, forgets or is killed while calls are on their way.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use palisade::Mode;
use palisade::backend::{LockBackend, RedisBackend, RedisOptions};
use palisade::protocol::{Acquire, Acquired, Inspection, Released, Renewed};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use crate::redis_asks::{Client, P0, SOON, connect, key, lease, left, renew, tokens};
use crate::support::{RedisServer, wait_until};

use Mode::{Exclusive as X, Shared as S};

const A_MOMENT: Duration = Duration::from_millis(150);

async fn impatient(url: &str) -> RedisBackend {
    let options =
        RedisOptions { reconnect_for: Duration::from_millis(300), ..RedisOptions::default() };
    RedisBackend::connect(url, options).await.unwrap()
}

/// Polls once, so that what it sends is on its way.
async fn begin<F: Future + ?Sized>(future: &mut Pin<Box<F>>) {
    std::future::poll_fn(|context| {
        assert!(future.as_mut().poll(context).is_pending());
        Poll::Ready(())
    })
    .await;
}

/// Between a client and its server. It can lose replies, and it can fall silent.
struct Proxy {
    port: u16,
    /// Connections that exist now pass nothing on from now on; later ones do.
    frozen: Arc<AtomicUsize>,
    /// The next reply is dropped, and its connection with it.
    lose_reply: Arc<AtomicBool>,
    lost: Arc<AtomicUsize>,
    _task: AbortOnDropHandle<()>,
}

impl Proxy {
    async fn before(server: &RedisServer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let frozen = Arc::new(AtomicUsize::new(0));
        let lose_reply = Arc::new(AtomicBool::new(false));
        let lost = Arc::new(AtomicUsize::new(0));
        let target = server.port();
        let shared = (Arc::clone(&frozen), Arc::clone(&lose_reply), Arc::clone(&lost));
        let task = tokio::spawn(async move {
            let mut all = tokio::task::JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                let (frozen, lose_reply, lost) = shared.clone();
                let born = frozen.load(Ordering::SeqCst);
                all.spawn(async move {
                    let Ok(server) = TcpStream::connect(("127.0.0.1", target)).await else {
                        return;
                    };
                    let (mut from_client, mut to_client) = client.into_split();
                    let (mut from_server, mut to_server) = server.into_split();
                    let silent = || frozen.load(Ordering::SeqCst) > born;
                    let there = async {
                        let mut buffer = vec![0; 65536];
                        loop {
                            let Ok(n @ 1..) = from_client.read(&mut buffer).await else { return };
                            if silent() {
                                std::future::pending::<()>().await;
                            }
                            if to_server.write_all(&buffer[..n]).await.is_err() {
                                return;
                            }
                        }
                    };
                    let back = async {
                        let mut buffer = vec![0; 65536];
                        loop {
                            let Ok(n @ 1..) = from_server.read(&mut buffer).await else { return };
                            if silent() {
                                std::future::pending::<()>().await;
                            }
                            if lose_reply.swap(false, Ordering::SeqCst) {
                                lost.fetch_add(1, Ordering::SeqCst);
                                return;
                            }
                            if to_client.write_all(&buffer[..n]).await.is_err() {
                                return;
                            }
                        }
                    };
                    tokio::select! { () = there => {}, () = back => {} }
                });
            }
        });
        Self { port, frozen, lose_reply, lost, _task: AbortOnDropHandle::new(task) }
    }

    fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }
}

#[tokio::test]
async fn a_reply_that_was_lost_is_asked_for_again_and_the_operation_happens_once() {
    let server = RedisServer::start();
    let proxy = Proxy::before(&server).await;
    let redis = RedisBackend::connect(&proxy.url(), RedisOptions::default()).await.unwrap();
    let client = Client::of(&redis).await;
    let (first, second) = (client.ask(&[("a", X), ("b", S)]), client.ask(&[("a", X)]));
    let lose = || proxy.lose_reply.store(true, Ordering::SeqCst);
    lose();
    let acquired = redis.acquire(&first).await.unwrap();
    lose();
    assert_eq!(tokens(&redis.acquire(&first).await.unwrap()), tokens(&acquired));
    assert_eq!(redis.inspect(P0, &key("a")).await.unwrap().holders.len(), 1);
    lose();
    assert!(matches!(redis.acquire(&second).await.unwrap(), Acquired::Queued { position: 0, .. }));
    assert_eq!(redis.inspect(P0, &key("a")).await.unwrap().waiters.len(), 1);
    lose();
    assert_eq!(renew(&redis, &first, false).await, Renewed::Held(None));
    lose();
    let unsure = redis.release(&first.part).await.unwrap_err();
    assert_eq!(unsure.kind(), palisade::ErrorKind::Unavailable, "the copy finds nothing: {unsure}");
    assert_eq!(redis.release(&first.part).await.unwrap(), Released::Gone);
    assert!(matches!(renew(&redis, &second, true).await, Renewed::Held(Some(_))));
    lose();
    redis.cancel(&second.part).await.unwrap();
    assert_eq!(redis.inspect(P0, &key("a")).await.unwrap(), Inspection::default());
    assert_eq!(proxy.lost.load(Ordering::SeqCst), 6);
}

#[tokio::test]
async fn a_connection_that_stalls_is_replaced_and_closed_at_the_server() {
    let server = RedisServer::start();
    let proxy = Proxy::before(&server).await;
    let redis = RedisBackend::connect(&proxy.url(), RedisOptions::default()).await.unwrap();
    let client = Client::of(&redis).await;
    let held = client.ask(&[("k", X)]);
    tokens(&redis.acquire(&held).await.unwrap());
    let before = server.command(&["CLIENT", "LIST"]).lines().count();
    proxy.frozen.fetch_add(1, Ordering::SeqCst);
    let mut abandoned = 0;
    while timeout(A_MOMENT, redis.ping()).await.is_err() {
        abandoned += 1;
        assert!(abandoned < 10, "it is never replaced");
    }
    assert!(abandoned >= 3, "{abandoned}");
    assert_eq!(redis.release(&held.part).await.unwrap(), Released::Released);
    wait_until("the stalled connection is closed", SOON, async || {
        server.command(&["CLIENT", "LIST"]).lines().count() == before
    })
    .await;
    // Pushes arrive on the new connection.
    let (first, second) = (client.ask(&[("k", X)]), client.ask(&[("k", X)]));
    redis.acquire(&first).await.unwrap();
    redis.acquire(&second).await.unwrap();
    redis.release(&first.part).await.unwrap();
    assert!(client.was_told(&second));
}

#[tokio::test]
async fn a_call_that_waits_on_a_stalled_connection_moves_to_the_new_one() {
    let server = RedisServer::start();
    let proxy = Proxy::before(&server).await;
    let redis = RedisBackend::connect(&proxy.url(), RedisOptions::default()).await.unwrap();
    let client = Client::of(&redis).await;
    let ask = client.ask(&[("k", X)]);
    proxy.frozen.fetch_add(1, Ordering::SeqCst);
    let (acquired, ()) = tokio::join!(timeout(SOON, redis.acquire(&ask)), async {
        while timeout(A_MOMENT, redis.ping()).await.is_err() {}
    });
    tokens(&acquired.unwrap().unwrap());
}

#[tokio::test]
async fn a_server_that_is_not_there_fails_the_call_soon_and_says_why() {
    let server = RedisServer::start();
    let redis = impatient(&server.url()).await;
    let client = Client::of(&redis).await;
    server.kill();
    for _ in 0..2 {
        let begun = Instant::now();
        let error = redis.acquire(&client.ask(&[("k", X)])).await.unwrap_err();
        assert!(error.is_unavailable(), "{error:?}");
        let source = std::error::Error::source(&error).unwrap().to_string();
        assert!(source.contains("refused"), "{source}");
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    }
    let asks: Vec<_> = (0..50).map(|_| client.ask(&[("k", X)])).collect();
    let begun = Instant::now();
    let all = futures_util::future::join_all(asks.iter().map(|ask| redis.acquire(ask))).await;
    assert!(all.iter().all(|result| result.as_ref().unwrap_err().is_unavailable()));
    assert!(begun.elapsed() < Duration::from_secs(5), "they wait side by side");
    server.restart_empty();
    tokens(&redis.acquire(&client.ask(&[("k", X)])).await.unwrap());
}

#[tokio::test]
async fn a_call_lives_through_a_restart_that_is_shorter_than_its_patience() {
    let server = RedisServer::start();
    let options = RedisOptions { reconnect_for: SOON, ..RedisOptions::default() };
    let redis = RedisBackend::connect(&server.url(), options).await.unwrap();
    let client = Client::of(&redis).await;
    server.kill();
    let ask = client.ask(&[("k", X)]);
    let mut acquire = redis.acquire(&ask);
    begin(&mut acquire).await;
    server.restart_empty();
    tokens(&acquire.await.unwrap());
}

#[tokio::test]
async fn pushes_arrive_again_after_a_restart_though_nobody_calls() {
    let server = RedisServer::start();
    let (redis, other) = (connect(&server).await, connect(&server).await);
    let client = Client::of(&redis).await;
    let channel = format!("palisade:c:{}", client.id);
    server.restart_empty();
    wait_until("the channel is subscribed to", SOON, async || {
        server.command(&["PUBSUB", "NUMSUB", &channel]).ends_with("\n1")
    })
    .await;
    let (first, second) = (client.ask(&[("k", X)]), client.ask(&[("k", X)]));
    other.acquire(&first).await.unwrap();
    other.acquire(&second).await.unwrap();
    other.release(&first.part).await.unwrap();
    wait_until("the grant is pushed", SOON, async || client.was_told(&second)).await;
    redis.unsubscribe(client.id);
    wait_until("the channel is left", SOON, async || {
        server.command(&["PUBSUB", "NUMSUB", &channel]).ends_with("\n0")
    })
    .await;
}

#[tokio::test]
async fn who_waits_at_a_server_that_was_restarted_empty_learns_that_it_is_lost() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let (holder, waiter) = (client.ask(&[("k", X)]), client.ask(&[("k", X)]));
    redis.acquire(&holder).await.unwrap();
    redis.acquire(&waiter).await.unwrap();
    server.restart_empty();
    assert_eq!(renew(&redis, &holder, false).await, Renewed::Lost);
    assert_eq!(renew(&redis, &waiter, true).await, Renewed::Lost);
    assert_eq!(redis.release(&holder.part).await.unwrap(), Released::Gone);
    assert!(matches!(redis.acquire(&waiter).await.unwrap(), Acquired::Granted(_)));
}

#[tokio::test]
async fn an_acquire_that_a_stopped_server_runs_late_is_settled_by_its_cancel() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    for (stalls, keys) in [(1, &[("a", X), ("b", S)][..]), (5, &[("c", X)])] {
        let asks: Vec<_> = (0..stalls).map(|_| client.ask(keys)).collect();
        server.stop();
        for ask in &asks {
            assert!(timeout(A_MOMENT, redis.acquire(ask)).await.is_err());
        }
        // The cancel is sent while nothing answers, as a caller would do.
        let cancels = asks.iter().map(|ask| async {
            while !matches!(timeout(A_MOMENT, redis.cancel(&ask.part)).await, Ok(Ok(()))) {}
        });
        let (_, ()) = tokio::join!(futures_util::future::join_all(cancels), async {
            sleep(A_MOMENT).await;
            server.cont();
        });
        for (name, _) in keys {
            assert_eq!(redis.inspect(P0, &key(name)).await.unwrap(), Inspection::default());
        }
        let rest: Vec<_> = left(&server).into_iter().filter(|name| !name.contains(":x:")).collect();
        assert!(rest.is_empty(), "{rest:?}");
        for ask in &asks {
            assert_eq!(redis.acquire(ask).await.unwrap(), Acquired::Cancelled);
        }
    }
}

#[tokio::test]
async fn a_grant_may_be_pushed_before_its_waiter_has_heard_that_it_is_queued() {
    let server = RedisServer::start();
    let (one, two) = (connect(&server).await, connect(&server).await);
    let (a, b) = (Client::of(&one).await, Client::of(&two).await);
    let (first, second) = (a.ask(&[("k", X)]), b.ask(&[("k", X)]));
    one.acquire(&first).await.unwrap();
    let mut acquire = two.acquire(&second);
    begin(&mut acquire).await;
    wait_until("it stands in line", SOON, async || {
        one.inspect(P0, &key("k")).await.unwrap().waiters.len() == 1
    })
    .await;
    one.release(&first.part).await.unwrap();
    wait_until("the grant is pushed", SOON, async || b.was_told(&second)).await;
    assert!(matches!(acquire.await.unwrap(), Acquired::Queued { .. }));
    assert_eq!(tokens(&two.acquire(&second).await.unwrap()), b.pushed()[0].grant.tokens);
}

#[tokio::test]
async fn a_grant_whose_push_was_lost_is_found_by_the_refresh() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    redis.unsubscribe(client.id);
    let (first, second) = (client.ask(&[("k", X)]), client.ask(&[("k", X)]));
    redis.acquire(&first).await.unwrap();
    redis.acquire(&second).await.unwrap();
    redis.release(&first.part).await.unwrap();
    assert!(client.pushed().is_empty());
    let Renewed::Held(Some(grant)) = renew(&redis, &second, true).await else { panic!() };
    assert_eq!(grant.tokens.len(), 1);
}

/// Refreshes as a client does, until the request holds. Returns how long that took.
async fn wait_in_line(redis: &RedisBackend, ask: &Acquire) -> Duration {
    let begun = Instant::now();
    loop {
        match renew(redis, ask, true).await {
            Renewed::Queued { ask_again_in } => sleep(ask_again_in).await,
            Renewed::Held(Some(_)) => return begun.elapsed(),
            other => panic!("{other:?}"),
        }
        assert!(begun.elapsed() < SOON);
    }
}

#[tokio::test]
async fn a_holder_that_vanishes_keeps_others_waiting_for_one_lease() {
    let server = RedisServer::start();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    let length = 1_500;
    let vanishing = connect(&server).await;
    let gone = Client::of(&vanishing).await;
    let holder = Acquire { lease: lease(length), ..gone.ask(&[("k", X), ("l", X)]) };
    // A waiter that vanishes too, first in line.
    let dead = Acquire { lease: lease(length), ..gone.ask(&[("k", X)]) };
    tokens(&vanishing.acquire(&holder).await.unwrap());
    vanishing.acquire(&dead).await.unwrap();
    let waiters =
        [Acquire { lease: lease(length), ..client.ask(&[("k", X)]) }, client.ask(&[("l", S)])];
    for waiter in &waiters {
        redis.acquire(waiter).await.unwrap();
    }
    drop(vanishing);
    let waits = waiters.iter().map(|waiter| wait_in_line(&redis, waiter));
    let waits = futures_util::future::join_all(waits).await;
    println!("waited {waits:?}");
    // Its own refresh interval is ten seconds: it is told to ask when the lease ends.
    assert!(waits[1] < Duration::from_millis(length + 4_000), "{waits:?}");
    assert!(waits[1] > Duration::from_millis(length / 2), "{waits:?}");
    // Behind a dead waiter, at its next refresh.
    assert!(waits[0] < Duration::from_millis(length + 500 + 4_000), "{waits:?}");
}

#[tokio::test]
async fn a_backend_that_is_dropped_leaves_no_task_and_no_connection() {
    let server = RedisServer::start();
    let clients = || server.command(&["CLIENT", "LIST"]).lines().count();
    let before = clients();
    let tasks = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let redis = connect(&server).await;
    let client = Client::of(&redis).await;
    tokens(&redis.acquire(&client.ask(&[("k", X)])).await.unwrap());
    assert!(clients() > before);
    drop(redis);
    wait_until("its tasks and connections have ended", SOON, async || {
        tokio::runtime::Handle::current().metrics().num_alive_tasks() == tasks
            && clients() == before
    })
    .await;
}
