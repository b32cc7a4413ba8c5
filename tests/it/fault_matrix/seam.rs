//! The operations of the lock seam.

use std::sync::Arc;
use std::time::Instant;

use palisade::Mode::Exclusive as X;
use palisade::backend::{LockBackend, RedisBackend};
use palisade::protocol::{Acquire, Acquired, Inspection, Released, Renewed, Standing};
use palisade::{ErrorKind, FencingToken, OwnerId};
use tokio::task::yield_now;
use tokio::time::timeout;

use super::{CALL, Lane, Trouble, dust_settles, run, troubles};
use crate::redis_asks::{Client, P0, SOON, ask, key, lease, renewal, tokens};
use crate::support::{Proxy, wait_until};

const KEY: &str = "k";
/// Longer than a cell lasts.
const LEASE: u64 = 20_000;
/// What a renewal asks for.
const RENEWED: u64 = 600_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Acquire,
    Renew,
    /// A renewal by one who does not know yet that it was granted.
    Refresh,
    Release,
    Cancel,
    Inspect,
    Ping,
    Subscribe,
}

/// An operation about the request `mine`, and who stands at the key: before it, after it, and when
/// the request was cancelled. Holders, then a bar and the line; `own` is another request of the
/// same owner, `theirs` one of another.
#[derive(Clone, Copy, Debug)]
struct Row(Operation, &'static str, &'static str, &'static str);

const TABLE: &[Row] = &[
    Row(Operation::Acquire, "", "mine", ""),
    Row(Operation::Acquire, "theirs", "theirs|mine", "theirs"),
    Row(Operation::Acquire, "own", "own mine", "own"),
    Row(Operation::Acquire, "own|theirs", "own mine|theirs", "own|theirs"),
    Row(Operation::Renew, "mine", "mine", ""),
    Row(Operation::Renew, "own mine|theirs", "own mine|theirs", "own|theirs"),
    Row(Operation::Refresh, "theirs|mine", "theirs|mine", "theirs"),
    Row(Operation::Refresh, "mine|theirs", "mine|theirs", "theirs"),
    Row(Operation::Release, "mine", "", ""),
    Row(Operation::Release, "mine|theirs", "theirs", "theirs"),
    Row(Operation::Release, "own mine|theirs", "own|theirs", "own|theirs"),
    Row(Operation::Cancel, "", "", ""),
    Row(Operation::Cancel, "mine|theirs", "theirs", "theirs"),
    Row(Operation::Cancel, "theirs|mine", "theirs", "theirs"),
    Row(Operation::Inspect, "mine|theirs", "mine|theirs", "theirs"),
    Row(Operation::Ping, "mine|theirs", "mine|theirs", "theirs"),
    Row(Operation::Subscribe, "mine|theirs", "mine|theirs", "theirs"),
];

/// What a caller does that was told nothing for certain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Settling {
    /// It sends the same again until it is answered.
    Again,
    /// It cancels the request until that is answered.
    Cancel,
}

#[derive(Clone, Copy, Debug)]
struct Cell {
    row: Row,
    trouble: Trouble,
    settling: Settling,
}

/// What an operation answered.
#[derive(Debug)]
enum Answer {
    Acquired(Acquired),
    Renewed(Renewed),
    Released(Released),
    Inspected(Inspection),
    Done,
}

/// Everybody who takes part in a cell.
struct Scene {
    direct: Arc<RedisBackend>,
    through: RedisBackend,
    proxy: Proxy,
    me: Client,
    other: Client,
    mine: Acquire,
    own: Acquire,
    theirs: Acquire,
    /// What stood at the key before.
    before: Inspection,
}

#[tokio::test]
async fn the_state_at_the_server_is_what_the_caller_was_told() {
    let mut cells = Vec::new();
    for row in TABLE {
        for trouble in troubles() {
            cells.push(Cell { row: *row, trouble, settling: Settling::Again });
            let changes = row.1 != row.2 || matches!(row.0, Operation::Renew | Operation::Refresh);
            if changes && trouble.leaves_doubt() {
                cells.push(Cell { row: *row, trouble, settling: Settling::Cancel });
            }
        }
    }
    let ended = run(cells, play).await;
    for end in [
        "answered",
        "unanswered, not done",
        "unanswered, done",
        "unavailable, not done",
        "unavailable, done",
    ] {
        assert!(ended.get(end).is_some_and(|times| *times > 0), "no cell was {end}: {ended:?}");
    }
}

async fn play(cell: Cell, lane: Lane) -> &'static str {
    let Row(operation, before, after, _) = cell.row;
    let scene = Scene::set_up(&lane, operation, before).await;
    let Scene { direct, through, proxy, .. } = &scene;
    proxy.refuse(cell.trouble.stays_away);
    proxy.plan("", cell.trouble.fault);
    let since = Instant::now();
    let told = timeout(CALL, scene.call(operation, through)).await;
    wait_until("the fault has struck", SOON, async || !proxy.struck().is_empty()).await;
    if cell.trouble.stays_away {
        proxy.refuse(false);
        proxy.calm();
    }
    let seen = direct.inspect(P0, &key(KEY)).await.unwrap();
    let stands = scene.name(&seen);
    let end = match &told {
        Ok(Ok(answer)) => {
            scene.check(answer, &seen, since);
            scene.hears(operation).await;
            assert_eq!(stands, after, "told {answer:?}");
            "answered"
        }
        uncertain => {
            if let Ok(Err(error)) = uncertain {
                assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
            }
            assert!(stands == before || stands == after, "{stands}");
            match (uncertain.is_err(), before == after, stands == after) {
                (_, true, _) => "uncertain, and no matter",
                (true, _, false) => "unanswered, not done",
                (true, _, true) => "unanswered, done",
                (false, _, false) => "unavailable, not done",
                (false, _, true) => "unavailable, done",
            }
        }
    };
    let stands = if end == "answered" { after } else { scene.settle(cell, since).await };
    scene.end(cell.row, stands, &lane).await;
    end
}

impl Scene {
    async fn set_up(lane: &Lane, operation: Operation, stands: &str) -> Self {
        let proxy = Proxy::start(lane.server.port()).await;
        let (direct, through) = (Arc::clone(&lane.direct), lane.through(&proxy).await);
        let other = Client::deaf();
        let me = match operation {
            Operation::Subscribe => Client::deaf(),
            _ => Client::of(&through).await,
        };
        let owner = OwnerId::new(me.id);
        let request = |client, owner| Acquire {
            lease: lease(LEASE),
            metadata: Some("whose".to_owned()),
            ..ask(client, owner, &[(KEY, X)])
        };
        let mut mine = request(me.id, owner);
        if stands.contains("own") {
            mine.standing = Standing::Incremental;
        }
        let own = request(me.id, owner);
        let theirs = request(other.id, OwnerId::new(other.id));
        let before = Inspection::default();
        let mut scene = Self { direct, through, proxy, me, other, mine, own, theirs, before };
        for name in stands.split(['|', ' ']).filter(|name| !name.is_empty()) {
            let ask = match name {
                "mine" => &scene.mine,
                "own" => &scene.own,
                _ => &scene.theirs,
            };
            scene.direct.acquire(ask).await.unwrap();
        }
        scene.before = scene.direct.inspect(P0, &key(KEY)).await.unwrap();
        assert_eq!(scene.name(&scene.before), stands);
        scene
    }

    async fn call(&self, operation: Operation, on: &RedisBackend) -> palisade::Result<Answer> {
        let part = &self.mine.part;
        let renewal = |waiting| {
            let long = Acquire { lease: lease(RENEWED), ..self.mine.clone() };
            [renewal(&long, waiting)]
        };
        Ok(match operation {
            Operation::Acquire => Answer::Acquired(on.acquire(&self.mine).await?),
            Operation::Renew => Answer::Renewed(on.renew(P0, &renewal(false)).await?.remove(0)),
            Operation::Refresh => Answer::Renewed(on.renew(P0, &renewal(true)).await?.remove(0)),
            Operation::Release => Answer::Released(on.release(part).await?),
            Operation::Inspect => Answer::Inspected(on.inspect(P0, &key(KEY)).await?),
            Operation::Cancel => on.cancel(part).await.map(|()| Answer::Done)?,
            Operation::Ping => on.ping().await.map(|()| Answer::Done)?,
            Operation::Subscribe => self.me.subscribe(on).await.map(|()| Answer::Done)?,
        })
    }

    fn name(&self, seen: &Inspection) -> String {
        name(&[&self.mine, &self.own, &self.theirs], seen)
    }

    /// What was answered is so; `since` is when it was asked for.
    fn check(&self, answer: &Answer, seen: &Inspection, since: Instant) {
        let holder = seen.holders.iter().find(|holder| holder.request == self.mine.part.request);
        let token = holder.map(|holder| holder.token);
        // What the caller counts on: its lease from when it asked, less the drift of the clocks.
        let counts_on = |ms| {
            let lease = lease(ms);
            (lease.get() - lease.drift()).saturating_sub(since.elapsed())
        };
        let lasts = |ms| holder.is_some_and(|holder| holder.expires_in >= counts_on(ms));
        let in_line = seen.waiters.iter().find(|at| at.request == self.mine.part.request);
        let waits = in_line.is_some_and(|waiter| waiter.expires_in >= counts_on(LEASE));
        match answer {
            Answer::Acquired(Acquired::Granted(grant)) => {
                assert_eq!(Some(grant.tokens[0]), token);
                assert!(seen.holders.iter().all(|entry| Some(entry.token) == token), "re-entered");
                assert!(lasts(LEASE), "{seen:?}");
            }
            Answer::Renewed(Renewed::Held(grant)) => {
                assert!(grant.iter().all(|grant| Some(grant.tokens[0]) == token), "{grant:?}");
                assert!(lasts(RENEWED), "{seen:?}");
            }
            Answer::Acquired(Acquired::Queued { .. }) | Answer::Renewed(Renewed::Queued { .. }) => {
                assert!(waits, "{seen:?}");
            }
            Answer::Inspected(told) => {
                assert_eq!(self.name(told), self.name(seen));
                let tokens = |of: &Inspection| -> Vec<FencingToken> {
                    of.holders.iter().map(|holder| holder.token).collect()
                };
                assert_eq!(tokens(told), tokens(seen));
            }
            // A copy that comes second finds nothing to release.
            Answer::Released(Released::Released | Released::Gone) => {}
            Answer::Done => {}
            other => panic!("no answer that the table knows: {other:?}"),
        }
    }

    /// Goes on until the caller knows. Returns what must stand at the key then.
    async fn settle(&self, cell: Cell, first: Instant) -> &'static str {
        let (again, stands) = match cell.settling {
            Settling::Again => (cell.row.0, cell.row.2),
            Settling::Cancel => (Operation::Cancel, cell.row.3),
        };
        let started = Instant::now();
        let (since, answer) = loop {
            let since = Instant::now();
            if let Ok(Ok(answer)) = timeout(CALL, self.call(again, &self.through)).await {
                break (since, answer);
            }
            assert!(started.elapsed() < SOON, "never answered again");
        };
        let seen = self.direct.inspect(P0, &key(KEY)).await.unwrap();
        // A copy of an acquire answers the same as the first one, and adds nothing.
        let since = if again == Operation::Acquire { first } else { since };
        self.check(&answer, &seen, since);
        self.hears(again).await;
        assert_eq!(self.name(&seen), stands, "settled by {answer:?}");
        stands
    }

    /// Who has subscribed hears of its grants. A push may be lost, so there are several. Who waits
    /// refreshes, and so finds out that a connection is dead on which there are only pushes.
    async fn hears(&self, operation: Operation) {
        if operation != Operation::Subscribe {
            return;
        }
        wait_until("a push arrives", SOON, async || {
            let (first, second) = (self.other.ask(&[("other", X)]), self.me.ask(&[("other", X)]));
            self.direct.acquire(&first).await.unwrap();
            self.direct.acquire(&second).await.unwrap();
            let refresh = [renewal(&second, true)];
            let _ = timeout(CALL, self.through.renew(P0, &refresh)).await;
            self.direct.release(&first.part).await.unwrap();
            let told = async {
                while !self.me.was_told(&second) {
                    yield_now().await
                }
            };
            let told = timeout(CALL, told).await.is_ok();
            self.direct.release(&second.part).await.unwrap();
            told
        })
        .await;
    }

    /// Nothing comes late, nothing is left behind, and no token is given out twice.
    async fn end(self, row: Row, stands: &str, lane: &Lane) {
        drop(self.through);
        dust_settles(&self.proxy).await;
        let direct = &self.direct;
        let look = async || direct.inspect(P0, &key(KEY)).await.unwrap();
        let name = |seen: &Inspection| name(&[&self.mine, &self.own, &self.theirs], seen);
        assert_eq!(name(&look().await), stands, "something came late");
        direct.cancel(&self.mine.part).await.unwrap();
        let seen = look().await;
        assert_eq!(name(&seen), row.3, "cancelled");
        assert_eq!(direct.acquire(&self.mine).await.unwrap(), Acquired::Cancelled);
        let highest = |of: &Inspection| of.holders.iter().map(|holder| holder.token).max();
        for holder in &seen.holders {
            let held = self.before.holders.iter().find(|before| before.owner == holder.owner);
            match held {
                Some(before) => assert_eq!(holder.token, before.token),
                None => assert!(Some(holder.token) > highest(&self.before), "{seen:?}"),
            }
        }
        for ask in [&self.own, &self.theirs] {
            direct.cancel(&ask.part).await.unwrap();
        }
        let fresh = self.other.ask(&[(KEY, X)]);
        let token = tokens(&direct.acquire(&fresh).await.unwrap())[0];
        assert!(Some(token) > highest(&self.before).max(highest(&seen)));
        assert_eq!(direct.release(&fresh.part).await.unwrap(), Released::Released);
        lane.assert_clean();
    }
}

/// Who stands at the key, in the words of the table.
fn name([mine, own, theirs]: &[&Acquire; 3], seen: &Inspection) -> String {
    let name = |request| {
        let all = [("mine", mine), ("own", own), ("theirs", theirs)];
        all.into_iter().find(|(_, ask)| ask.part.request == request).unwrap().0
    };
    let holders: Vec<_> = seen.holders.iter().map(|holder| name(holder.request)).collect();
    let waiters: Vec<_> = seen.waiters.iter().map(|waiter| name(waiter.request)).collect();
    let bar = if waiters.is_empty() { "" } else { "|" };
    format!("{}{bar}{}", holders.join(" "), waiters.join(" "))
}
