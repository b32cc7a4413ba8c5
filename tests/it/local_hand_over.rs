//! Waiters of one process that pass a lock among themselves: in order, each with a token of its
//! own, never a lost one, and never past somebody of another process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use async_trait::async_trait;
use palisade::backend::{
    Capabilities, LockBackend, MemoryBackend, Push, RedisBackend, RedisOptions, Sink,
};
use palisade::protocol::{Acquire, Acquired, Inspection, Part, Released, Renewal, Renewed};
use palisade::{
    ClientId, Error, ErrorKind, FencingToken, LockGuard, LockOptions, Locks, Partition, ResourceKey,
};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::advance;

use crate::cancel::{at_every_await, drop_after};
use crate::support::{RedisServer, wait_until};

const SOON: Duration = Duration::from_secs(20);
/// As many tokens as one grant reserves.
const BLOCK: u64 = 256;

async fn over(backend: &Arc<MemoryBackend>, options: LockOptions) -> Locks {
    Locks::with_options(Arc::clone(backend) as _, options).await.unwrap()
}

async fn memory() -> (Arc<MemoryBackend>, Locks) {
    let backend = Arc::new(MemoryBackend::new());
    let locks = over(&backend, LockOptions::default()).await;
    (backend, locks)
}

async fn redis(server: &RedisServer) -> Locks {
    palisade::connect_with(&server.url(), LockOptions::default()).await.unwrap()
}

/// Lets the background tasks run until they have nothing to do.
async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

/// How many stand at the service: holders and waiters.
async fn standing(locks: &Locks) -> (usize, usize) {
    let seen = locks.inspect("k").await.unwrap();
    (seen.holders.len(), seen.waiters.len())
}

/// The key is held by one who got it from the service for a lane of waiters, over a paused clock.
async fn lane(locks: &Locks) -> LockGuard {
    let first = locks.lock("k").acquire().await.unwrap();
    let second = tokio::spawn(locks.lock("k").acquire());
    settle().await;
    first.release().await.unwrap();
    let second = second.await.unwrap().unwrap();
    second.confirmed().await.unwrap();
    second
}

fn number(token: FencingToken) -> u64 {
    token.get()
}

/// Tasks that each take the key, tell their name and token, and give it up.
struct Crew {
    told: UnboundedSender<(&'static str, u64)>,
    order: UnboundedReceiver<(&'static str, u64)>,
    tasks: JoinSet<()>,
}

impl Crew {
    fn new() -> Self {
        let (told, order) = unbounded_channel();
        Self { told, order, tasks: JoinSet::new() }
    }

    fn send(&mut self, locks: &Locks, name: &'static str) {
        let (request, told) = (locks.lock("k"), self.told.clone());
        self.tasks.spawn(async move {
            let guard = request.acquire().await.unwrap();
            told.send((name, number(guard.token()))).unwrap();
            guard.release().await.unwrap();
        });
    }

    /// The names in the order of their grants, whose tokens must have grown.
    async fn come_back(mut self, after: u64) -> Vec<&'static str> {
        self.tasks.join_all().await;
        let (mut names, mut last) = (Vec::new(), after);
        while let Ok((name, token)) = self.order.try_recv() {
            assert!(token > last, "{name} has {token} after {last}");
            last = token;
            names.push(name);
        }
        names
    }
}

/// Takes the key `times` times in each of `tasks` tasks. Nobody is inside beside another, and
/// tokens grow from holder to holder.
async fn storm(locks: &Locks, tasks: usize, times: usize) {
    let last = Arc::new(AtomicU64::new(0));
    let mut storm = JoinSet::new();
    for _ in 0..tasks {
        let (locks, last) = (locks.clone(), Arc::clone(&last));
        storm.spawn(async move {
            for _ in 0..times {
                let guard = locks.lock("k").wait(SOON).acquire().await.unwrap();
                let token = number(guard.token());
                let before = last.swap(token, SeqCst);
                assert!(before < token, "{before} before {token}");
                tokio::task::yield_now().await;
                assert_eq!(last.load(SeqCst), token, "somebody else is inside");
                guard.release().await.unwrap();
            }
        });
    }
    storm.join_all().await;
}

#[tokio::test(start_paused = true)]
async fn waiters_of_one_process_are_served_in_order_with_one_request() {
    let (_, locks) = memory().await;
    let first = locks.lock("k").acquire().await.unwrap();
    let mut crew = Crew::new();
    for name in ["a", "b", "c", "d", "e"] {
        crew.send(&locks, name);
        settle().await;
    }
    assert_eq!(standing(&locks).await, (1, 1), "one stands in line for all");
    let token = number(first.token());
    first.release().await.unwrap();
    assert_eq!(crew.come_back(token).await, ["a", "b", "c", "d", "e"]);
    settle().await;
    assert_eq!(standing(&locks).await, (0, 0));
    let statistics = locks.statistics();
    assert_eq!((statistics.acquired, statistics.released, statistics.active), (6, 6, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_grow_over_many_passes_and_lanes() {
    let (_, locks) = memory().await;
    storm(&locks, 24, 200).await;
    let server = RedisServer::start();
    let locks = redis(&server).await;
    storm(&locks, 24, 200).await;
    wait_until("nothing is left", SOON, async || standing(&locks).await == (0, 0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hand_over_within_the_process_sends_next_to_nothing() {
    let server = RedisServer::start();
    let locks = redis(&server).await;
    storm(&locks, 1, 1).await;
    let calls = || {
        let info = server.command(&["INFO", "commandstats"]);
        let line = info.lines().find(|line| line.starts_with("cmdstat_evalsha:")).unwrap();
        let calls = line.split("calls=").nth(1).unwrap().split(',').next().unwrap();
        calls.parse::<usize>().unwrap()
    };
    let before = calls();
    storm(&locks, 16, 256).await;
    let sent = calls() - before;
    println!("{sent} commands for {} hand-overs", 16 * 256);
    assert!(sent <= 16 * 256 / 16, "{sent} commands for {} hand-overs", 16 * 256);
}

#[tokio::test(start_paused = true)]
async fn a_lane_that_is_full_is_followed_by_the_next() {
    let (_, locks) = memory().await;
    let first = locks.lock("k").acquire().await.unwrap();
    let mut crew = Crew::new();
    for _ in 0..2 * BLOCK + 3 {
        crew.send(&locks, "one of many");
    }
    settle().await;
    assert_eq!(standing(&locks).await, (1, 3));
    first.release().await.unwrap();
    assert_eq!(crew.come_back(0).await.len() as u64, 2 * BLOCK + 3);
    settle().await;
    assert_eq!(standing(&locks).await, (0, 0));
}

/// The holder at the service has lost its lease; those who wait behind it ask anew and get grants
/// of their own, none of them from the block of the lost one.
async fn all_are_served_after(lost: u64, waiters: Vec<JoinHandle<palisade::Result<LockGuard>>>) {
    let mut last = lost + BLOCK;
    for waiter in waiters {
        let guard = waiter.await.unwrap().unwrap();
        assert!(number(guard.token()) > last, "{} after {lost}", guard.token());
        last = number(guard.token());
        guard.release().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_lost_lease_is_not_passed_on() {
    for dropped in [false, true] {
        let (backend, locks) = memory().await;
        let holder = lane(&locks).await;
        let token = number(holder.token());
        let mut waiters = Vec::new();
        for _ in 0..5 {
            waiters.push(tokio::spawn(locks.lock("k").wait(SOON).acquire()));
            settle().await;
        }
        assert_eq!(standing(&locks).await, (1, 0));
        backend.forget();
        holder.lost().await;
        all_are_served_after(token, waiters).await;
        if dropped {
            drop(holder);
        } else {
            assert_eq!(holder.release().await.unwrap_err().kind(), ErrorKind::LeaseLost);
        }
        settle().await;
        assert_eq!(standing(&locks).await, (0, 0));
    }
}

#[tokio::test(start_paused = true)]
async fn a_process_that_was_stopped_for_longer_than_its_lease_passes_nothing_on() {
    let (_, locks) = memory().await;
    let holder = lane(&locks).await;
    let token = number(holder.token());
    let waiters: Vec<_> =
        (0..3).map(|_| tokio::spawn(locks.lock("k").wait(3 * SOON).acquire())).collect();
    settle().await;
    advance(2 * LockOptions::default().lease).await;
    assert_eq!(holder.release().await.unwrap_err().kind(), ErrorKind::LeaseLost);
    all_are_served_after(token, waiters).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everybody_is_served_when_redis_is_emptied_in_the_midst() {
    let server = RedisServer::start();
    let locks = redis(&server).await;
    let lease = Duration::from_millis(600);
    let request = || locks.lock("k").ttl(lease).wait(SOON);
    let first = request().acquire().await.unwrap();
    let second = tokio::spawn(request().acquire());
    wait_until("it stands in line", SOON, async || standing(&locks).await == (1, 1)).await;
    let mut waiters: Vec<_> = (0..20).map(|_| tokio::spawn(request().acquire())).collect();
    first.release().await.unwrap();
    let holder = second.await.unwrap().unwrap();
    holder.confirmed().await.unwrap();
    server.command(&["FLUSHALL"]);
    tokio::time::timeout(4 * lease, holder.lost()).await.expect("the holder hears of it");
    let mut tokens = Vec::new();
    while !waiters.is_empty() {
        let (guard, _, rest) = futures_util::future::select_all(waiters).await;
        let guard = guard.unwrap().unwrap();
        tokens.push(number(guard.token()));
        guard.release().await.unwrap();
        waiters = rest;
    }
    assert!(tokens.is_sorted_by(|a, b| a < b) && tokens[0] > number(holder.token()) + BLOCK);
    assert_eq!(holder.release().await.unwrap_err().kind(), ErrorKind::LeaseLost);
}

#[tokio::test(start_paused = true)]
async fn a_waiter_that_is_dropped_at_any_await_costs_nobody_a_turn() {
    let (_, locks) = memory().await;
    for plain in [true, false] {
        let holder =
            if plain { locks.lock("k").acquire().await.unwrap() } else { lane(&locks).await };
        let behind = std::cell::RefCell::new(Vec::new());
        let wait = Duration::from_millis(50);
        let attempt = || locks.lock("k").wait(wait).acquire();
        let check = async || {
            behind.borrow_mut().push(tokio::spawn(locks.lock("k").wait(SOON).acquire()));
            settle().await;
        };
        assert!(at_every_await(attempt, check).await > 0);
        holder.release().await.unwrap();
        for waiter in behind.into_inner() {
            waiter.await.unwrap().unwrap().release().await.unwrap();
        }
        settle().await;
        assert_eq!(standing(&locks).await, (0, 0));
        assert_eq!(locks.statistics().active, 0);
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_is_dropped_before_it_sees_its_turn_passes_it_on() {
    let (_, locks) = memory().await;
    let holder = lane(&locks).await;
    let token = number(holder.token());
    let mut gone = Box::pin(locks.lock("k").acquire());
    assert!(!drop_after(gone.as_mut(), 0).await, "it waits in the lane");
    let next = tokio::spawn(locks.lock("k").acquire());
    settle().await;
    drop(holder);
    drop(gone);
    let next = next.await.unwrap().unwrap();
    assert_eq!(number(next.token()), token + 2, "the token of the one that has gone is not used");
    next.release().await.unwrap();
    settle().await;
    assert_eq!((standing(&locks).await, locks.statistics().active), ((0, 0), 0));
}

#[tokio::test(start_paused = true)]
async fn whoever_is_first_and_gives_up_costs_the_others_no_place_in_the_line() {
    for dropped in [true, false] {
        let backend = Arc::new(MemoryBackend::new());
        let ours = over(&backend, LockOptions::default()).await;
        let theirs = over(&backend, LockOptions::default()).await;
        let first = ours.lock("k").acquire().await.unwrap();
        let short = Duration::from_secs(1);
        let gives_up = tokio::spawn(ours.lock("k").wait(short).acquire());
        settle().await;
        let mut crew = Crew::new();
        crew.send(&ours, "a");
        settle().await;
        crew.send(&theirs, "x");
        settle().await;
        if dropped {
            gives_up.abort();
        } else {
            assert_eq!(gives_up.await.unwrap().unwrap_err().kind(), ErrorKind::TimedOut);
        }
        settle().await;
        assert_eq!(standing(&ours).await, (1, 2));
        crew.send(&ours, "b");
        settle().await;
        first.release().await.unwrap();
        assert_eq!(crew.come_back(0).await, ["a", "x", "b"]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_lane_that_nobody_waits_for_leaves_the_line() {
    let backend = Arc::new(MemoryBackend::new());
    let (ours, theirs) = (
        over(&backend, LockOptions::default()).await,
        over(&backend, LockOptions::default()).await,
    );
    let holder = theirs.lock("k").acquire().await.unwrap();
    let _plain = tokio::spawn(ours.lock("k").wait(SOON).acquire());
    settle().await;
    let crowd: Vec<_> = (0..5).map(|_| tokio::spawn(ours.lock("k").wait(SOON).acquire())).collect();
    settle().await;
    assert_eq!((standing(&theirs).await, ours.statistics().waiting), ((1, 2), 6));
    crowd.iter().for_each(JoinHandle::abort);
    settle().await;
    assert_eq!((standing(&theirs).await, ours.statistics().waiting), ((1, 1), 1));
    let kept = ours.lock("k").wait(Duration::from_secs(2)).acquire();
    let mut kept = Box::pin(kept);
    assert!(!drop_after(kept.as_mut(), 0).await);
    settle().await;
    assert_eq!(standing(&theirs).await, (1, 2));
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(standing(&theirs).await, (1, 1), "its time is over, polled or not");
    assert_eq!(kept.await.unwrap_err().kind(), ErrorKind::TimedOut);
    holder.release().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn whoever_is_handed_the_lock_and_never_looks_keeps_it_for_two_leases_at_most() {
    let lease = LockOptions::default().lease;
    for plain in [true, false] {
        let (_, locks) = memory().await;
        let holder =
            if plain { locks.lock("k").acquire().await.unwrap() } else { lane(&locks).await };
        let mut kept = Box::pin(locks.lock("k").wait(SOON).acquire());
        assert!(!drop_after(kept.as_mut(), 0).await, "it waits in the lane");
        let next = tokio::spawn(locks.lock("k").wait(3 * lease).acquire());
        settle().await;
        let token = number(holder.token());
        holder.release().await.unwrap();
        let before = tokio::time::Instant::now();
        let next = next.await.unwrap().unwrap();
        assert!(before.elapsed() <= 2 * lease, "{:?}", before.elapsed());
        assert!(number(next.token()) >= token + BLOCK, "nothing of a lease that was lost");
        assert_eq!(kept.await.unwrap_err().kind(), ErrorKind::LeaseLost);
        next.release().await.unwrap();
        settle().await;
        assert_eq!((standing(&locks).await, locks.statistics().active), ((0, 0), 0));
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_looks_late_at_what_it_was_handed_has_it_renewed_from_then_on() {
    let lease = LockOptions::default().lease;
    let (_, locks) = memory().await;
    let holder = lane(&locks).await;
    let mut kept = Box::pin(locks.lock("k").wait(9 * lease).acquire());
    assert!(!drop_after(kept.as_mut(), 0).await, "it waits in the lane");
    settle().await;
    holder.release().await.unwrap();
    tokio::time::sleep(lease * 3 / 2).await;
    let guard = kept.await.unwrap();
    tokio::time::sleep(9 * lease).await;
    assert!(guard.is_held());
}

#[tokio::test(start_paused = true)]
async fn a_service_that_is_shut_down_passes_nothing_on() {
    let (_, locks) = memory().await;
    let holder = lane(&locks).await;
    let mut kept = Box::pin(locks.lock("k").wait(SOON).acquire());
    assert!(!drop_after(kept.as_mut(), 0).await, "it waits in the lane");
    let ours = locks.clone();
    let ends = tokio::spawn(async move { ours.shutdown().await });
    settle().await;
    holder.release().await.unwrap();
    ends.await.unwrap().unwrap();
    assert_eq!(kept.await.unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn whoever_waits_for_a_lane_learns_that_the_runtime_of_the_service_is_gone() {
    let theirs = || {
        // It runs only now.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let (_, locks) = runtime.block_on(memory());
        (runtime, locks)
    };
    let (runtime, locks) = tokio::task::spawn_blocking(theirs).await.unwrap();
    let _holder = locks.lock("k").acquire().await.unwrap();
    let waiter = tokio::spawn(locks.lock("k").wait(9 * SOON).acquire());
    settle().await;
    runtime.shutdown_background();
    let answer = tokio::time::timeout(SOON, waiter).await.unwrap().unwrap();
    assert_eq!(answer.unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test(start_paused = true)]
async fn whoever_does_not_look_before_its_time_is_over_is_passed_over() {
    let (_, locks) = memory().await;
    let holder = locks.lock("k").acquire().await.unwrap();
    let short = Duration::from_secs(1);
    let mut kept = Box::pin(locks.lock("k").wait(short).acquire());
    assert!(!drop_after(kept.as_mut(), 0).await, "it waits in the lane");
    let next = tokio::spawn(locks.lock("k").wait(SOON).acquire());
    settle().await;
    tokio::time::sleep(2 * short).await;
    holder.release().await.unwrap();
    let before = tokio::time::Instant::now();
    next.await.unwrap().unwrap().release().await.unwrap();
    assert_eq!(before.elapsed(), Duration::ZERO);
    assert_eq!(kept.await.unwrap_err().kind(), ErrorKind::TimedOut);
}

#[tokio::test(start_paused = true)]
async fn a_shutdown_takes_every_lane_out_of_the_line() {
    let backend = Arc::new(MemoryBackend::new());
    let (ours, theirs) = (
        over(&backend, LockOptions::default()).await,
        over(&backend, LockOptions::default()).await,
    );
    let holder = theirs.lock("k").acquire().await.unwrap();
    let crowd: Vec<_> = (0..5).map(|_| tokio::spawn(ours.lock("k").wait(SOON).acquire())).collect();
    settle().await;
    assert_eq!(standing(&theirs).await, (1, 2), "one that came first, and a lane");
    ours.shutdown().await.unwrap();
    for refused in crowd {
        assert_eq!(refused.await.unwrap().unwrap_err().kind(), ErrorKind::Closed);
    }
    assert_eq!((standing(&theirs).await, ours.statistics().waiting), ((1, 0), 0));
    holder.release().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn nobody_may_ask_as_the_owner_of_a_lane() {
    let (_, locks) = memory().await;
    let holder = lane(&locks).await;
    let shown = locks.inspect("k").await.unwrap().holders[0].owner;
    assert!(shown.is_group() && shown != holder.owner());
    for key in ["k", "l"] {
        let refused = locks.lock(key).owner(shown).try_acquire().await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidInput, "{refused}");
        assert!(refused.to_string().contains("Locks::owner"), "{refused}");
    }
    let coordinator = palisade::Coordinator::builder(locks.clone()).build();
    let refused = coordinator.transaction(["k"]).owner(shown).begin().await.unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::InvalidInput, "{refused}");
    let busy = locks.lock("k").wait(Duration::ZERO).acquire().await.unwrap_err();
    assert!(busy.to_string().contains("a group of waiters of one process"), "{busy}");
    assert!(holder.is_held());
}

#[tokio::test(start_paused = true)]
async fn whoever_lost_its_lease_elsewhere_is_passed_over() {
    let (_, locks) = memory().await;
    let holder = lane(&locks).await;
    let state = Arc::new(palisade::LeaseState::default());
    let lost = tokio::spawn(locks.lock("k").state(Arc::clone(&state)).wait(SOON).acquire());
    let next = tokio::spawn(locks.lock("k").wait(SOON).acquire());
    settle().await;
    state.lose();
    let token = number(holder.token());
    holder.release().await.unwrap();
    let next = next.await.unwrap().unwrap();
    assert_eq!(number(next.token()), token + 1, "the grant goes on to the next");
    next.release().await.unwrap();
    assert_eq!(lost.await.unwrap().unwrap_err().kind(), ErrorKind::LeaseLost);
    settle().await;
    assert_eq!((standing(&locks).await, locks.statistics().active), ((0, 0), 0));
}

#[tokio::test(start_paused = true)]
async fn a_lane_that_locks_more_leaves_its_waiters_to_the_next_in_order() {
    let backend = Arc::new(MemoryBackend::new());
    let (ours, theirs) = (
        over(&backend, LockOptions::default()).await,
        over(&backend, LockOptions::default()).await,
    );
    let holder = lane(&ours).await;
    let token = number(holder.token());
    let mut crew = Crew::new();
    for (locks, name) in [(&ours, "a"), (&ours, "b"), (&theirs, "x"), (&ours, "c")] {
        crew.send(locks, name);
        settle().await;
    }
    assert_eq!(standing(&ours).await, (1, 2), "theirs, and a lane for who came after it");
    let more = ours.lock("l").owner(holder.owner()).acquire().await.unwrap();
    settle().await;
    crew.send(&ours, "d");
    settle().await;
    assert_eq!(standing(&ours).await, (1, 2), "whoever is left goes to the lane that is there");
    holder.release().await.unwrap();
    more.release().await.unwrap();
    let told = crew.come_back(token).await;
    assert_eq!(told, ["x", "a", "b", "c", "d"]);
    settle().await;
    assert_eq!((standing(&ours).await, standing(&theirs).await), ((0, 0), (0, 0)));
}

#[tokio::test(start_paused = true)]
async fn after_a_lane_that_locked_more_the_next_passes_on_again() {
    let (_, locks) = memory().await;
    let holder = lane(&locks).await;
    let more = locks.lock("l").owner(holder.owner()).acquire().await.unwrap();
    let waiters: Vec<_> = (0..3).map(|_| tokio::spawn(locks.lock("k").acquire())).collect();
    settle().await;
    assert_eq!(standing(&locks).await, (1, 1), "it stands in line at once");
    holder.release().await.unwrap();
    more.release().await.unwrap();
    let mut tokens = Vec::new();
    for waiter in waiters {
        let guard = waiter.await.unwrap().unwrap();
        tokens.push(number(guard.token()));
        guard.release().await.unwrap();
    }
    assert_eq!(tokens, [tokens[0], tokens[0] + 1, tokens[0] + 2], "one block");
}

#[tokio::test(start_paused = true)]
async fn a_holder_re_enters_with_its_own_token_and_what_it_entered_is_not_passed_on() {
    let (_, locks) = memory().await;
    let holder = lane(&locks).await;
    let second = tokio::spawn(locks.lock("k").acquire());
    settle().await;
    holder.release().await.unwrap();
    let second = second.await.unwrap().unwrap();
    let owner = second.owner();
    let again = locks.lock("k").owner(owner).acquire().await.unwrap();
    assert_eq!(again.token(), second.token(), "not the token that the service knows");
    assert_eq!(second.info().hold_count, 2);
    let more = locks.lock("l").owner(owner).acquire().await.unwrap();
    assert!(more.token() > second.token());
    let third = tokio::spawn(locks.lock("k").acquire());
    settle().await;
    let token = second.token();
    second.release().await.unwrap();
    settle().await;
    assert!(!third.is_finished(), "one entry of two is left");
    let more_still = locks.lock("m").owner(owner).acquire().await.unwrap();
    again.release().await.unwrap();
    let third = third.await.unwrap().unwrap();
    assert!(third.token() > token);
    assert!(more.is_held() && more_still.is_held());
    let refused = locks.lock("l").try_acquire().await.unwrap();
    assert!(refused.is_none(), "what was locked beside it is not the next holder's");
}

#[tokio::test(start_paused = true)]
async fn an_owner_that_was_seen_holds_nothing_after_its_turn() {
    let (backend, locks) = memory().await;
    let there = over(&backend, LockOptions::default()).await;
    let holder = lane(&locks).await;
    let second = tokio::spawn(locks.lock("k").acquire());
    settle().await;
    let seen = holder.locked().clone();
    holder.release().await.unwrap();
    let _second = second.await.unwrap().unwrap();
    for locks in [&locks, &there] {
        let again = locks.lock("k").owner(seen.owner()).try_acquire().await.unwrap();
        assert!(again.is_none(), "its grant has another holder now");
    }
}

#[tokio::test(start_paused = true)]
async fn an_owner_that_was_named_is_known_to_the_service_and_can_be_lent() {
    let (backend, locks) = memory().await;
    let there = over(&backend, LockOptions::default()).await;
    let holder = lane(&locks).await;
    let owner = locks.owner();
    let named = tokio::spawn(locks.lock("k").owner(owner).acquire());
    settle().await;
    assert_eq!(standing(&locks).await, (1, 1), "it stands in line for itself");
    let late = tokio::spawn(locks.lock("k").acquire());
    settle().await;
    holder.release().await.unwrap();
    let named = named.await.unwrap().unwrap();
    let lent = there.lock("k").owner(owner).acquire().await.unwrap();
    assert_eq!(lent.token(), named.token());
    named.release().await.unwrap();
    settle().await;
    assert!(!late.is_finished());
    lent.release().await.unwrap();
    late.await.unwrap().unwrap().release().await.unwrap();
}

/// The order in which a crew of two processes is served: `a` to `c` come before another process,
/// `x`, then `d` to `f`.
async fn served_by(ours: &Locks, theirs: &Locks, arrived: impl AsyncFn()) -> Vec<&'static str> {
    let first = ours.lock("k").acquire().await.unwrap();
    let mut crew = Crew::new();
    for name in ["a", "b", "c", "x", "d", "e", "f"] {
        crew.send(if name == "x" { theirs } else { ours }, name);
        arrived().await;
    }
    let token = number(first.token());
    first.release().await.unwrap();
    crew.come_back(token).await
}

#[tokio::test(start_paused = true)]
async fn nobody_is_overtaken_unless_the_options_say_so() {
    for (passes, millis, expected) in [
        (0, 0, ["a", "b", "c", "x", "d", "e", "f"]),
        (0, 9_000, ["a", "b", "c", "x", "d", "e", "f"]),
        (9, 0, ["a", "b", "c", "x", "d", "e", "f"]),
        (1, 9_000, ["a", "b", "c", "d", "x", "e", "f"]),
        (9, 9_000, ["a", "b", "c", "d", "e", "f", "x"]),
    ] {
        let mut options = LockOptions::default();
        options.hand_over.passes = passes;
        options.hand_over.time = Duration::from_millis(millis);
        let backend = Arc::new(MemoryBackend::new());
        let (ours, theirs) = (over(&backend, options).await, over(&backend, options).await);
        assert_eq!(served_by(&ours, &theirs, settle).await, expected, "{:?}", options.hand_over);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_of_another_process_is_overtaken_on_redis() {
    let server = RedisServer::start();
    let (ours, theirs) = (redis(&server).await, redis(&server).await);
    let arrived = AtomicU64::new(0);
    let asked = async || {
        // All ask for the same lane, then there is `x`, then a lane for the others. Notices come
        // before the answers to whoever asked after they were sent.
        let n = arrived.fetch_add(1, SeqCst) + 1;
        let at_service = [1, 1, 1, 2, 3, 3, 3][usize::try_from(n).unwrap() - 1];
        wait_until("it has arrived", SOON, async || {
            let waiting = ours.statistics().waiting + theirs.statistics().waiting;
            (waiting, standing(&ours).await.1) == (n, at_service)
        })
        .await;
        standing(&ours).await;
    };
    let order = served_by(&ours, &theirs, asked).await;
    assert_eq!(order, ["a", "b", "c", "x", "d", "e", "f"]);
}

#[tokio::test(start_paused = true)]
async fn it_can_be_switched_off() {
    let mut options = LockOptions::default();
    assert!(options.hand_over.enabled, "it is on unless it is switched off");
    options.hand_over.enabled = false;
    let locks = over(&Arc::new(MemoryBackend::new()), options).await;
    let first = locks.lock("k").acquire().await.unwrap();
    let mut crew = Crew::new();
    ["a", "b", "c"].into_iter().for_each(|name| crew.send(&locks, name));
    settle().await;
    assert_eq!(standing(&locks).await, (1, 3), "each stands in line for itself");
    first.release().await.unwrap();
    assert_eq!(crew.come_back(0).await.len(), 3);
}

/// A lock service in memory whose notices and answers can be lost.
#[derive(Debug, Default)]
struct Lossy {
    inner: Arc<MemoryBackend>,
    no_notice: Arc<AtomicBool>,
    no_push: Arc<AtomicBool>,
    no_answer: AtomicBool,
    no_renewal: AtomicBool,
}

fn unavailable() -> Error {
    Error::new(ErrorKind::Unavailable, "test", "the answer is lost")
}

#[async_trait]
impl LockBackend for Lossy {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }
    async fn subscribe(&self, client: ClientId, sink: Sink) -> palisade::Result<()> {
        let (notice, grant) = (Arc::clone(&self.no_notice), Arc::clone(&self.no_push));
        let some: Sink = Arc::new(move |push| {
            let lost = if matches!(push, Push::Followed(_)) { &notice } else { &grant };
            if !lost.load(SeqCst) {
                sink(push);
            }
        });
        self.inner.subscribe(client, some).await
    }
    fn unsubscribe(&self, client: ClientId) {
        self.inner.unsubscribe(client);
    }
    async fn acquire(&self, ask: &Acquire) -> palisade::Result<Acquired> {
        let answer = self.inner.acquire(ask).await;
        if self.no_answer.load(SeqCst) {
            tokio::time::sleep(Duration::from_millis(10)).await;
            return Err(unavailable());
        }
        answer
    }
    async fn renew(&self, at: Partition, asks: &[Renewal]) -> palisade::Result<Vec<Renewed>> {
        if self.no_renewal.load(SeqCst) {
            return Err(unavailable());
        }
        self.inner.renew(at, asks).await
    }
    async fn release(&self, part: &Part) -> palisade::Result<Released> {
        self.inner.release(part).await
    }
    async fn cancel(&self, part: &Part) -> palisade::Result<()> {
        self.inner.cancel(part).await
    }
    async fn inspect(&self, at: Partition, key: &ResourceKey) -> palisade::Result<Inspection> {
        self.inner.inspect(at, key).await
    }
    async fn ping(&self) -> palisade::Result<()> {
        Ok(())
    }
}

async fn lossy() -> (Arc<Lossy>, Locks, Locks) {
    let backend = Arc::new(Lossy::default());
    let connect =
        async || Locks::with_options(Arc::clone(&backend) as _, LockOptions::default()).await;
    let (ours, theirs) = (connect().await.unwrap(), connect().await.unwrap());
    (backend, ours, theirs)
}

#[tokio::test(start_paused = true)]
async fn a_lost_notice_costs_one_refresh() {
    let (backend, ours, theirs) = lossy().await;
    let holder = lane(&ours).await;
    backend.no_notice.store(true, SeqCst);
    let mut crew = Crew::new();
    crew.send(&theirs, "x");
    settle().await;
    backend.no_notice.store(false, SeqCst);
    crew.send(&ours, "before the refresh");
    settle().await;
    tokio::time::sleep(LockOptions::default().lease / 3).await;
    crew.send(&ours, "after the refresh");
    settle().await;
    let token = number(holder.token());
    holder.release().await.unwrap();
    let order = crew.come_back(token).await;
    assert_eq!(order, ["before the refresh", "x", "after the refresh"]);
}

#[tokio::test(start_paused = true)]
async fn all_in_a_lane_hear_of_it_when_its_answer_is_lost() {
    let (backend, locks, _) = lossy().await;
    let first = locks.lock("k").acquire().await.unwrap();
    backend.no_answer.store(true, SeqCst);
    let behind: Vec<_> = (0..4).map(|_| tokio::spawn(locks.lock("k").acquire())).collect();
    settle().await;
    let before = tokio::time::Instant::now();
    for failed in behind {
        let error = failed.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        let source = std::error::Error::source(&error).unwrap();
        assert!(source.to_string().contains("the answer is lost"), "{error} {source}");
    }
    assert!(before.elapsed() < Duration::from_millis(20), "it was asked once for all");
    backend.no_answer.store(false, SeqCst);
    first.release().await.unwrap();
    settle().await;
    assert_eq!(standing(&locks).await, (0, 0), "what may have been queued was cancelled");
    // Three answers were lost: until the service has been asked again, requests are refused.
    wait_until("the service is used again", SOON, async || locks.lock("k").acquire().await.is_ok())
        .await;
    settle().await;
    assert_eq!(standing(&locks).await, (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_lost_push_costs_a_refresh_and_no_tokens() {
    let (backend, ours, theirs) = lossy().await;
    let lease = LockOptions::default().lease;
    let holder = theirs.lock("k").auto_renew(false).acquire().await.unwrap();
    let alone = tokio::spawn(ours.lock("k").wait(SOON).acquire());
    settle().await;
    let waiters: Vec<_> =
        (0..3).map(|_| tokio::spawn(ours.lock("k").wait(3 * lease).acquire())).collect();
    settle().await;
    assert_eq!(standing(&ours).await, (1, 2));
    alone.abort();
    settle().await;
    backend.no_push.store(true, SeqCst);
    // The holder lapses, and the refresh of the lane finds it.
    holder.lost().await;
    let mut tokens = Vec::new();
    for waiter in waiters {
        let guard = waiter.await.unwrap().unwrap();
        tokens.push(number(guard.token()));
        guard.release().await.unwrap();
    }
    assert_eq!(tokens, [tokens[0], tokens[0] + 1, tokens[0] + 2], "one block");
}

#[tokio::test(start_paused = true)]
async fn a_grant_that_was_pushed_is_passed_on_unconfirmed_however_long_its_lease() {
    for lease in [LockOptions::default().lease, Duration::from_secs(60 * 60)] {
        let (backend, ours, theirs) = lossy().await;
        let holder = theirs.lock("k").ttl(lease).acquire().await.unwrap();
        let alone = tokio::spawn(ours.lock("k").ttl(lease).wait(SOON).acquire());
        settle().await;
        let ask = || tokio::spawn(ours.lock("k").ttl(lease).wait(SOON).acquire());
        let waiters: Vec<_> = (0..3).map(|_| ask()).collect();
        settle().await;
        alone.abort();
        settle().await;
        assert_eq!(standing(&ours).await, (1, 1));
        backend.no_renewal.store(true, SeqCst);
        holder.release().await.unwrap();
        let mut tokens = Vec::new();
        for waiter in waiters {
            let guard = waiter.await.unwrap().unwrap();
            tokens.push(number(guard.token()));
            guard.release().await.unwrap();
        }
        assert_eq!(tokens, [tokens[0], tokens[0] + 1, tokens[0] + 2], "{lease:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_that_answers_again_is_no_outage_any_more() {
    let (backend, ours, _) = lossy().await;
    // Whose calls are all answered.
    let theirs = over(&backend.inner, LockOptions::default()).await;
    let lease = LockOptions::default().lease;
    let holder = lane(&ours).await;
    let long = tokio::spawn(ours.lock("k").wait(4 * lease).acquire());
    settle().await;
    let follower = tokio::spawn(theirs.lock("k").wait(4 * lease).acquire());
    settle().await;
    backend.no_renewal.store(true, SeqCst);
    holder.lost().await;
    backend.no_renewal.store(false, SeqCst);
    // The lane of whoever is left stands behind the follower, and is answered.
    let follower = follower.await.unwrap().unwrap();
    let short = ours.lock("k").wait(lease / 10).acquire().await.unwrap_err();
    assert_eq!(short.kind(), ErrorKind::TimedOut, "{short}");
    follower.release().await.unwrap();
    long.await.unwrap().unwrap().release().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_lane_whose_service_stops_answering_ends_in_an_outage_and_not_in_a_time_out() {
    let (backend, locks, _) = lossy().await;
    let holder = lane(&locks).await;
    let wait = LockOptions::default().lease / 2;
    let waiter = tokio::spawn(locks.lock("k").wait(wait).acquire());
    settle().await;
    backend.no_renewal.store(true, SeqCst);
    let error = waiter.await.unwrap().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    assert!(holder.is_held());
}

#[tokio::test(start_paused = true)]
async fn a_grant_whose_renewal_is_overdue_is_not_passed_on() {
    let (backend, locks, _) = lossy().await;
    let holder = lane(&locks).await;
    let token = number(holder.token());
    let waiter = tokio::spawn(locks.lock("k").wait(SOON).acquire());
    settle().await;
    backend.no_renewal.store(true, SeqCst);
    tokio::time::sleep(LockOptions::default().lease * 3 / 4).await;
    assert!(holder.is_held());
    backend.no_renewal.store(false, SeqCst);
    // The watchdog has not renewed yet: nothing has run since.
    holder.release().await.unwrap();
    let waiter = waiter.await.unwrap().unwrap();
    assert!(number(waiter.token()) > token + BLOCK, "a grant of its own");
}

#[tokio::test]
async fn two_drivers_push_the_same_notices() {
    let server = RedisServer::start();
    let options = RedisOptions::default();
    let redis = RedisBackend::connect(&server.url(), options).await.unwrap();
    let memory = MemoryBackend::new();
    let both: [&dyn LockBackend; 2] = [&memory, &redis];
    for backend in both {
        let client = crate::redis_asks::Client::of(backend).await;
        let [one, two, three] = [(); 3].map(|()| client.ask(&[("k", palisade::Mode::Exclusive)]));
        for ask in [&one, &two, &three] {
            backend.acquire(ask).await.unwrap();
        }
        backend.ping().await.unwrap();
        let told = || client.followed().iter().map(|by| by.request).collect::<Vec<_>>();
        assert_eq!(told(), [one.part.request, two.part.request], "{backend:?}");
        crate::redis_asks::renew(backend, &three, true).await;
        backend.ping().await.unwrap();
        assert_eq!(told().len(), 3, "a refresh repeats the notice");
    }
}
