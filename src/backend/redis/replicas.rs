//! Waiting until replicas know of a grant.
//!
//! # Why a connection of its own
//! `WAIT` stops the connection on which it is sent: on the shared one, a replica that stands still
//! would hold up every renewal.
//!
//! # Why one call is enough for many grants
//! It waits for all that the server had written before. Whoever comes while one is under way waits
//! for the next one together with all others who came. A task asks, and they wait for it: the
//! future of one of them may be kept and not be polled.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use redis::{RedisError, Value};
use tokio::sync::{Notify, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::failure;
use super::options::MinReplicas;
use super::pace::Pace;
use super::server::{Server, Wire};
use crate::backend::{Push, Sink};
use crate::error::{Error, ErrorKind, Result};

/// `WAIT` counts who has what its connection has written last, so each begins with a write.
const WRITTEN: &str = "palisade:replicated";

/// The replicas of a server.
pub(super) struct Replicas {
    server: Arc<Server>,
    min: MinReplicas,
    /// How long the server may take for what is not the waiting.
    patience: Duration,
    arrived: AtomicU64,
    arrival: Notify,
    last: watch::Sender<Round>,
    /// Grants that were pushed, and to whom they go when replicas know of them.
    pushed: Mutex<Vec<(Sink, Push)>>,
    push: Notify,
}

/// The last `WAIT`.
struct Round {
    /// Those who had arrived before it.
    covers: u64,
    /// Whether there were enough.
    answer: Result<bool, RedisError>,
}

/// The connection on which it is asked.
struct Line {
    pace: Pace,
    wire: Option<(Wire, CancellationToken)>,
}

impl Replicas {
    pub(super) fn new(server: Arc<Server>, min: MinReplicas, patience: Duration) -> Self {
        Self {
            server,
            min,
            patience,
            arrived: AtomicU64::new(0),
            arrival: Notify::new(),
            last: watch::Sender::new(Round { covers: 0, answer: Ok(false) }),
            pushed: Mutex::default(),
            push: Notify::new(),
        }
    }

    /// Waits until enough replicas know of everything that the server has answered before.
    pub(super) async fn know(&self, operation: &'static str) -> Result<()> {
        let mut last = self.last.subscribe();
        let place = self.arrived.fetch_add(1, Ordering::Relaxed) + 1;
        self.arrival.notify_one();
        let answer = match last.wait_for(|round| round.covers >= place).await {
            Ok(round) => round.answer.clone(),
            Err(_) => Err(no_answer()),
        };
        match answer {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.too_few(operation)),
            Err(error) => Err(failure::explain(operation, error)),
        }
    }

    /// Asks for those who wait for it. Runs until it is dropped.
    pub(super) async fn ask(&self) {
        let mut line = Line { pace: Pace::new(self.patience), wire: None };
        let bound = self.min.within.saturating_add(self.patience);
        loop {
            self.arrival.notified().await;
            let covers = self.arrived.load(Ordering::Relaxed);
            let answer = timeout(bound, self.count(&mut line)).await;
            let answer = answer.unwrap_or_else(|_| Err(no_answer()));
            self.last.send_replace(Round { covers, answer });
        }
    }

    /// A sink that keeps grants back from `sink` until replicas know of them.
    pub(super) fn hold_back(self: Arc<Self>, sink: Sink) -> Sink {
        Arc::new(move |push| match push {
            Push::HandOver(_) => {
                self.pushed().push((Arc::clone(&sink), push));
                self.push.notify_one();
            }
            Push::Followed(_) => sink(push),
        })
    }

    /// Passes on what is held back. A grant that too few know of is dropped: its waiter asks again,
    /// and is told then. Runs until it is dropped.
    pub(super) async fn pass_on(&self) {
        loop {
            self.push.notified().await;
            let pushed = std::mem::take(&mut *self.pushed());
            if self.know("hand over").await.is_ok() {
                pushed.into_iter().for_each(|(sink, push)| sink(push));
            }
        }
    }

    fn pushed(&self) -> MutexGuard<'_, Vec<(Sink, Push)>> {
        self.pushed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there are enough. The connection is put back only when it has answered: one on which
    /// a `WAIT` was given up would hold up the next.
    async fn count(&self, line: &mut Line) -> Result<bool, RedisError> {
        let (mut wire, retired) = match line.wire.take() {
            Some((wire, retired)) if !retired.is_cancelled() => (wire, retired),
            lost => {
                line.pace.next(lost.is_some()).await;
                let retired = CancellationToken::new();
                (self.server.open(None, retired.clone()).await?, retired)
            }
        };
        let mut both = redis::pipe();
        both.cmd("SET").arg(WRITTEN).arg(1).arg("PX").arg(60_000);
        both.cmd("WAIT").arg(self.min.count).arg(self.min.within.as_millis().to_string());
        let mut enough = false;
        for answer in wire.connection.send_packed_commands(&both, 0, 2).await? {
            // The answer to the second one is the number of replicas.
            enough = match answer.extract_error()? {
                Value::Int(replicas) => replicas >= i64::from(self.min.count),
                _ => false,
            };
        }
        line.wire = Some((wire, retired));
        Ok(enough)
    }

    fn too_few(&self, operation: &'static str) -> Error {
        let MinReplicas { count, within } = self.min;
        let detail = format!(
            "fewer than {count} replicas of Redis had the grant after {within:?}, so it was given \
             up (RedisOptions::min_replicas)"
        );
        Error::new(ErrorKind::Unavailable, operation, detail)
    }
}

fn no_answer() -> RedisError {
    std::io::Error::from(std::io::ErrorKind::TimedOut).into()
}
