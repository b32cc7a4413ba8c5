//! The same faults under the lock service: requests that wait, guards, what is dropped.

use std::sync::Arc;
use std::time::{Duration, Instant};

use palisade::Mode::Exclusive as X;
use palisade::backend::LockBackend;
use palisade::protocol::{Acquire, Inspection};
use palisade::{ErrorKind, LockGuard, LockOptions, Locks, OwnerId};

use super::{CALL, Lane, Trouble, dust_settles, run, troubles};
use crate::redis_asks::{Client, P0, SOON, key, lease, tokens};
use crate::support::{Proxy, wait_until};

const KEY: &str = "k";
const LEASE: Duration = Duration::from_secs(8);
/// What nobody gives up is gone after a lease; the rest is for a busy machine.
const A_LEASE: Duration = Duration::from_secs(8 + 12);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Acquire,
    /// An acquire that others are in the way of, until the fault has struck.
    Wait,
    Renew,
    Release,
    Drop,
}

/// An operation of an owner that has entered the key so often before it, and how often when it was
/// done.
#[derive(Clone, Copy, Debug)]
struct Row(Operation, usize, usize);

const TABLE: &[Row] = &[
    Row(Operation::Acquire, 0, 1),
    Row(Operation::Acquire, 1, 2),
    Row(Operation::Wait, 0, 1),
    Row(Operation::Renew, 1, 1),
    Row(Operation::Renew, 2, 2),
    Row(Operation::Release, 1, 0),
    Row(Operation::Release, 2, 1),
    Row(Operation::Drop, 1, 0),
    Row(Operation::Drop, 2, 1),
];

#[derive(Clone, Copy, Debug)]
struct Cell {
    row: Row,
    trouble: Trouble,
}

#[tokio::test]
async fn guards_stand_for_what_is_held_and_nothing_outlives_its_lease() {
    let of = |row: &Row| {
        let row = *row;
        troubles().into_iter().map(move |trouble| Cell { row, trouble })
    };
    let ended = run(TABLE.iter().flat_map(of).collect(), play).await;
    for end in ["done", "failed, and taken back", "given up, and finished later"] {
        assert!(ended.get(end).is_some_and(|times| *times > 0), "no cell was {end}: {ended:?}");
    }
}

/// One owner that meets trouble.
struct Scene {
    lane: Lane,
    proxy: Proxy,
    locks: Locks,
    owner: OwnerId,
    guards: Vec<LockGuard>,
}

async fn play(cell: Cell, lane: Lane) -> &'static str {
    let Row(operation, before, after) = cell.row;
    let mut scene = Scene::set_up(lane, before).await;
    let others = match operation {
        Operation::Wait => Some(scene.others_hold().await),
        _ => None,
    };
    scene.proxy.refuse(cell.trouble.stays_away);
    scene.proxy.plan("", cell.trouble.fault);
    let told = scene.attempt(operation, others).await;
    scene.struck().await;
    let left = scene.entries().await;
    if cell.trouble.stays_away {
        scene.proxy.refuse(false);
        scene.proxy.calm();
    }
    let (end, stands) = match (operation, told) {
        (Operation::Drop, _) => ("given up, and finished later", after),
        (_, Ok(())) => {
            assert_eq!(left, after, "the caller was told that it is done");
            ("done", after)
        }
        (Operation::Release, Err(ErrorKind::Unavailable)) => {
            ("given up, and finished later", after)
        }
        (_, Err(ErrorKind::Unavailable)) => ("failed, and taken back", before),
        (_, Err(kind)) => panic!("{kind:?}"),
    };
    scene.end(stands).await;
    end
}

impl Scene {
    async fn set_up(lane: Lane, entries: usize) -> Self {
        let proxy = Proxy::start(lane.server.port()).await;
        let mut options = LockOptions::default();
        (options.lease, options.wait, options.call_timeout) = (LEASE, SOON, CALL);
        let through = Arc::new(lane.through(&proxy).await);
        let locks = Locks::with_options(through, options).await.unwrap();
        let owner = locks.owner();
        let mut guards = Vec::new();
        while guards.len() < entries {
            // On a busy machine the first attempt may be over before it is answered.
            guards.extend(locks.lock(KEY).owner(owner).acquire().await);
        }
        Self { lane, proxy, locks, owner, guards }
    }

    /// Somebody else holds the key.
    async fn others_hold(&self) -> Acquire {
        let ask = Acquire { lease: lease(60_000), ..Client::deaf().ask(&[(KEY, X)]) };
        tokens(&self.lane.direct.acquire(&ask).await.unwrap());
        ask
    }

    async fn struck(&self) {
        let struck = async || !self.proxy.struck().is_empty();
        wait_until("the fault has struck", SOON, struck).await;
    }

    /// Does what the cell is about, and returns what the caller is told.
    async fn attempt(
        &mut self,
        operation: Operation,
        others: Option<Acquire>,
    ) -> Result<(), ErrorKind> {
        let request = self.locks.lock(KEY).owner(self.owner);
        let told = match operation {
            Operation::Acquire => request.acquire().await.map(|guard| self.guards.push(guard)),
            Operation::Wait => {
                let make_way = async {
                    self.struck().await;
                    self.lane.direct.release(&others.unwrap().part).await.unwrap();
                };
                let (acquired, ()) = tokio::join!(request.acquire(), make_way);
                acquired.map(|guard| self.guards.push(guard))
            }
            Operation::Renew => {
                let since = Instant::now();
                let renewed = self.guards[0].renew().await;
                let left = self.guards[0].info().expires_in;
                if renewed.is_ok() {
                    let seen = self.look().await;
                    assert!(seen.holders[0].expires_in + since.elapsed() >= LEASE * 97 / 100);
                    assert!(left > Duration::ZERO);
                }
                renewed
            }
            Operation::Release => self.guards.pop().unwrap().release().await,
            Operation::Drop => {
                drop(self.guards.pop());
                Ok(())
            }
        };
        told.map_err(|error| error.kind())
    }

    async fn look(&self) -> Inspection {
        self.lane.direct.inspect(P0, &key(KEY)).await.unwrap()
    }

    /// How often the owner has entered the key, as the server sees it. Nobody else is there.
    async fn entries(&self) -> usize {
        let seen = self.look().await;
        assert!(seen.holders.iter().all(|holder| holder.owner == self.owner), "{seen:?}");
        seen.holders.len()
    }

    /// The server comes to see what the guards stand for, and nothing when there are none.
    async fn end(mut self, stands: usize) {
        self.settles(stands).await;
        let seen = self.look().await;
        assert_eq!(self.guards.len(), stands);
        for guard in &self.guards {
            assert!(guard.is_held());
            assert_eq!(guard.info().hold_count, stands);
            assert!(seen.holders.iter().all(|holder| holder.token == guard.token()), "{seen:?}");
        }
        self.guards.clear();
        self.settles(0).await;
        let Self { lane, proxy, locks, .. } = self;
        drop(locks);
        dust_settles(&proxy).await;
        let seen = lane.direct.inspect(P0, &key(KEY)).await.unwrap();
        assert_eq!(seen, Inspection::default(), "something came late");
        lane.assert_clean();
    }

    async fn settles(&self, entries: usize) {
        let settled = async || {
            let seen = self.look().await;
            seen.holders.len() == entries && seen.waiters.is_empty()
        };
        wait_until("the server sees what the guards stand for", A_LEASE, settled).await;
    }
}
