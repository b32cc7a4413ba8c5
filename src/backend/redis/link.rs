//! One connection to the server at a time: who connects, who waits for it, when it is given up.
//!
//! # Why not the manager of redis-rs
//! It never leaves a connection that is stalled: a server that was stopped, or a half-open socket,
//! takes every call with it until the system notices, which may take minutes. Here, calls that were
//! given up by their callers without any answer in between end the connection.
//!
//! # Why calls may be sent again
//! Every operation is known by owner and request, so a copy changes nothing. A call is sent again
//! on a new connection for as long as its caller waits, but no longer than the patience of the
//! link.

use std::borrow::Cow;
use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use redis::aio::MultiplexedConnection;
use redis::{Cmd, RedisError, Value};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::failure::{self, Remedy, explain, remedy};
use super::greeting::{self, Peer, Refusal};
use super::request::Share;
use super::script::{Call, Scripts};
use super::subscribers::Subscribers;
use super::together::{Together, Trip};
use crate::error::{Error, ErrorKind, Result};
use crate::protocol::Backoff;

/// So many calls in a row that nobody waited out, without any answer, end a connection ...
const STALLED_CALLS: u32 = 3;

/// ... if it has been silent for this long.
const STALLED_FOR: Duration = Duration::from_millis(100);

/// A connection that is replaced when it breaks or stalls.
pub(super) struct Link {
    client: redis::Client,
    partitions: u16,
    patience: Duration,
    scripts: Scripts,
    subscribers: Arc<Subscribers>,
    together: Together,
    current: Mutex<Option<Arc<Live>>>,
    /// Held while connecting, across awaits on purpose: one connects, the others wait for it.
    turn: tokio::sync::Mutex<Turn>,
    last_error: Mutex<Option<RedisError>>,
    /// Something that [`keep`](Link::keep) has to look at.
    changed: Notify,
}

/// What the server said, and whether it may have run an earlier copy of the call whose answer was
/// lost.
pub(super) struct Answer {
    pub(super) value: Value,
    pub(super) repeated: bool,
}

/// What the one who connects has to know.
struct Turn {
    not_before: Instant,
    previous: Option<Peer>,
}

/// A connection in use.
struct Live {
    connection: MultiplexedConnection,
    retired: CancellationToken,
    abandoned: AtomicU32,
    answered_at: Mutex<Instant>,
}

impl Link {
    pub(super) fn new(
        client: redis::Client,
        partitions: u16,
        patience: Duration,
        scripts: Scripts,
        subscribers: Arc<Subscribers>,
    ) -> Self {
        Self {
            client,
            partitions,
            patience,
            scripts,
            subscribers,
            together: Together::default(),
            current: Mutex::new(None),
            turn: tokio::sync::Mutex::new(Turn { not_before: Instant::now(), previous: None }),
            last_error: Mutex::new(None),
            changed: Notify::new(),
        }
    }

    /// Runs a script.
    pub(super) async fn call(&self, operation: &'static str, call: &Call) -> Result<Value> {
        self.run(operation, call).await.map(|answer| answer.value)
    }

    async fn run(&self, operation: &'static str, call: &Call) -> Result<Answer> {
        let scripts = &self.scripts;
        self.send(operation, call.by_hash(scripts), || Some(call.by_text(scripts))).await
    }

    /// Runs an operation: together with others if there is a crowd, else by itself.
    pub(super) async fn share(
        &self,
        operation: &'static str,
        share: impl FnOnce() -> Option<Share>,
        alone: impl FnOnce() -> Call,
    ) -> Result<Answer> {
        let (_under_way, crowded) = self.together.enter();
        let mut repeated = false;
        if crowded
            && let Some(live) = self.current()
            && let Some(share) = share()
        {
            let answer = self.together.join(share);
            let answer = live.answer(async { answer.await.map_err(|_| lost_connection()) }).await;
            match answer {
                Ok(Value::Int(0)) => {}
                Ok(value) => return Ok(Answer { value, repeated }),
                Err(_) => repeated = true,
            }
        }
        let answer = self.run(operation, &alone()).await?;
        Ok(Answer { repeated: repeated || answer.repeated, ..answer })
    }

    /// Sends what is to travel together. Runs until it is dropped.
    pub(super) async fn carry(self: Arc<Self>) {
        let mut trips = FuturesUnordered::new();
        loop {
            while let Some((call, trip)) = self.together.depart() {
                trips.push(self.travel(call, trip));
            }
            tokio::select! {
                () = self.together.changed() => {}
                Some(()) = trips.next(), if !trips.is_empty() => {}
            }
        }
    }

    async fn travel(&self, call: Call, trip: Trip<'_>) {
        let Some(live) = self.current() else { return trip.turn_back() };
        let answer = match live.send(&call.by_hash(&self.scripts)).await {
            Err(error) if remedy(&error) == Remedy::SendText => {
                live.send(&call.by_text(&self.scripts)).await
            }
            answer => answer,
        };
        match answer {
            Ok(values) => trip.arrive(values),
            Err(error) if remedy(&error) == Remedy::Reconnect => live.retired.cancel(),
            // The server refused the call as a whole.
            Err(_) => trip.turn_back(),
        }
    }

    /// Sends one command.
    pub(super) async fn command(&self, operation: &'static str, command: Cmd) -> Result<Value> {
        self.send(operation, Cow::Owned(command), || None).await.map(|answer| answer.value)
    }

    async fn send(
        &self,
        operation: &'static str,
        mut command: Cow<'_, Cmd>,
        text: impl Fn() -> Option<Cmd>,
    ) -> Result<Answer> {
        let mut patience = Patience::new(self.patience);
        let mut repeated = false;
        loop {
            let live = self.live(operation, &mut patience).await?;
            let error = match live.send(&command).await {
                Ok(value) => return Ok(Answer { value, repeated }),
                Err(error) => error,
            };
            match remedy(&error) {
                Remedy::SendText => match text() {
                    Some(text) => {
                        command = Cow::Owned(text);
                        continue;
                    }
                    None => return Err(explain(operation, error)),
                },
                Remedy::Reconnect => {
                    live.retired.cancel();
                    repeated = true;
                }
                Remedy::Wait => {}
                Remedy::GiveUp => return Err(explain(operation, error)),
            }
            if !patience.pause().await {
                return Err(explain(operation, error));
            }
        }
    }

    /// Hears the channel from now on, now and on every later connection.
    pub(super) async fn subscribe(&self, channel: &str) -> Result<()> {
        let mut patience = Patience::new(self.patience);
        loop {
            let live = self.live("subscribe", &mut patience).await?;
            let mut connection = live.connection.clone();
            let Err(error) = live.answer(connection.subscribe(channel)).await else {
                self.changed.notify_one();
                return Ok(());
            };
            match remedy(&error) {
                Remedy::Reconnect => live.retired.cancel(),
                Remedy::Wait => {}
                Remedy::SendText | Remedy::GiveUp => return Err(explain("subscribe", error)),
            }
            if !patience.pause().await {
                return Err(explain("subscribe", error));
            }
        }
    }

    /// Tells [`keep`](Link::keep) that a subscriber has left.
    pub(super) fn subscriber_left(&self) {
        self.changed.notify_one();
    }

    /// Connects again as soon as a connection is lost on which somebody waits for pushes: nobody
    /// may be calling then. Unsubscribes what nobody hears any more. Runs until it is dropped.
    pub(super) async fn keep(self: Arc<Self>) {
        loop {
            match self.current() {
                Some(live) => {
                    for channel in self.subscribers.take_left() {
                        // A push to nobody is harmless; the next connection asks for none.
                        let mut connection = live.connection.clone();
                        let _ = live.answer(connection.unsubscribe(channel)).await;
                    }
                    tokio::select! {
                        () = live.retired.cancelled() => {}
                        () = self.changed.notified() => {}
                    }
                }
                None if self.subscribers.channels().is_empty() => self.changed.notified().await,
                None => {
                    let mut patience = Patience::new(self.patience);
                    if let Err(error) = self.live("reconnect", &mut patience).await {
                        tracing::debug!(%error, "the lock service is out of reach");
                        sleep(self.patience).await;
                    }
                }
            }
        }
    }

    fn current(&self) -> Option<Arc<Live>> {
        lock(&self.current).clone().filter(|live| !live.retired.is_cancelled())
    }

    /// The connection in use, or a new one.
    async fn live(&self, operation: &'static str, patience: &mut Patience) -> Result<Arc<Live>> {
        loop {
            if let Some(live) = self.current() {
                return Ok(live);
            }
            let error = match timeout(patience.left(), self.connect_in_turn()).await {
                Ok(Ok(live)) => return Ok(live),
                Ok(Err(Refusal::Final(error))) => return Err(error),
                Ok(Err(Refusal::Redis(error))) => {
                    if remedy(&error) == Remedy::GiveUp {
                        return Err(explain(operation, error));
                    }
                    *lock(&self.last_error) = Some(error.clone());
                    Some(error)
                }
                Err(_) => lock(&self.last_error).clone(),
            };
            if patience.left().is_zero() {
                return Err(match error {
                    Some(error) => explain(operation, error),
                    None => no_answer(operation),
                });
            }
        }
    }

    /// Connects, unless somebody else has done so meanwhile.
    async fn connect_in_turn(&self) -> Result<Arc<Live>, Refusal> {
        let mut turn = self.turn.lock().await;
        if let Some(live) = self.current() {
            return Ok(live);
        }
        sleep_until(turn.not_before).await;
        // Set before the attempt, which may be dropped at any await.
        turn.not_before = Instant::now() + Duration::from_millis(fastrand::u64(10..40));
        let retired = CancellationToken::new();
        let mut connection =
            greeting::open(&self.client, &self.subscribers, retired.clone()).await?;
        let peer =
            greeting::greet(&mut connection, self.partitions, turn.previous.as_ref()).await?;
        turn.previous = peer;
        let channels = self.subscribers.channels();
        if !channels.is_empty() {
            connection.subscribe(channels).await?;
        }
        let live = Arc::new(Live {
            connection,
            retired,
            abandoned: AtomicU32::new(0),
            answered_at: Mutex::new(Instant::now()),
        });
        *lock(&self.current) = Some(Arc::clone(&live));
        *lock(&self.last_error) = None;
        self.changed.notify_one();
        Ok(live)
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The client knows the password, so it is not shown.
        f.debug_struct("Link").field("connected", &self.current().is_some()).finish_non_exhaustive()
    }
}

impl Live {
    async fn send(&self, command: &Cmd) -> Result<Value, RedisError> {
        let mut connection = self.connection.clone();
        self.answer(greeting::ask(&mut connection, command)).await
    }

    /// Waits for an answer for as long as this connection is the one in use.
    async fn answer<T>(
        &self,
        answer: impl Future<Output = Result<T, RedisError>>,
    ) -> Result<T, RedisError> {
        let mut call = OnItsWay { live: self, answered: false };
        let answer = tokio::select! {
            biased;
            answer = answer => answer,
            () = self.retired.cancelled() => {
                Err(lost_connection())
            }
        };
        call.answered = true;
        answer
    }
}

/// A call on its way. Dropped without an answer, it counts against its connection.
struct OnItsWay<'a> {
    live: &'a Live,
    answered: bool,
}

impl Drop for OnItsWay<'_> {
    fn drop(&mut self) {
        let Live { abandoned, answered_at, retired, .. } = self.live;
        if self.answered {
            abandoned.store(0, Ordering::Relaxed);
            *lock(answered_at) = Instant::now();
        } else if abandoned.fetch_add(1, Ordering::Relaxed) + 1 >= STALLED_CALLS
            && lock(answered_at).elapsed() >= STALLED_FOR
        {
            retired.cancel();
        }
    }
}

/// How long one call bears with a server that is out of reach or out of sorts.
struct Patience {
    since: Option<Instant>,
    attempt: u32,
    backoff: Backoff,
}

impl Patience {
    fn new(limit: Duration) -> Self {
        let backoff = Backoff {
            first: Duration::from_millis(5),
            max: Duration::from_millis(200),
            max_elapsed: limit,
            ..Backoff::default()
        };
        Self { since: None, attempt: 0, backoff }
    }

    /// The time that is left; it begins to run with the first trouble.
    fn left(&mut self) -> Duration {
        let since = *self.since.get_or_insert_with(Instant::now);
        self.backoff.max_elapsed.saturating_sub(since.elapsed())
    }

    /// Waits before the next attempt. False when there is no time for one.
    async fn pause(&mut self) -> bool {
        let elapsed = self.backoff.max_elapsed.saturating_sub(self.left());
        let Some(delay) = self.backoff.delay(self.attempt, fastrand::f64(), elapsed) else {
            return false;
        };
        self.attempt += 1;
        sleep(delay).await;
        true
    }
}

fn lost_connection() -> RedisError {
    std::io::Error::from(std::io::ErrorKind::NotConnected).into()
}

fn no_answer(operation: &'static str) -> Error {
    Error::new(ErrorKind::Unavailable, operation, failure::NO_ANSWER)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
