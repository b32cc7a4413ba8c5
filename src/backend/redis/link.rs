//! One connection to the server at a time: who connects, who waits for it, when it is given up.
//!
//! # Why calls do not connect themselves
//! A future may be polled once and then kept for long. One that held the turn to connect meanwhile
//! would stop all others, renewals too. So a task of the link connects, and gives each attempt the
//! same time whoever asked for it; calls wait for the outcome, each as long as it bears with it.
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
use redis::{Cmd, RedisError, Value};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::condition;
use super::failure::{self, Remedy, explain, remedy};
use super::greeting::{self, Peer, Refusal};
use super::options::RedisOptions;
use super::pace::{Pace, Patience};
use super::request::{self, Share};
use super::script::{Call, Scripts};
use super::server::{Server, Wire};
use super::subscribers::Subscribers;
use super::together::{Together, Trip};
use crate::error::{Error, ErrorKind, Result};
use crate::types::Partition;

/// So many calls in a row that nobody waited out, without any answer, end a connection ...
const STALLED_CALLS: u32 = 3;

/// ... if each was on its way for this long, and the connection has been silent for as long.
const STALLED_FOR: Duration = Duration::from_millis(100);

/// An attempt to connect has at least this long, however soon its callers give up: some round trips
/// and a handshake of TLS over a long way.
const LEAST_ATTEMPT: Duration = Duration::from_secs(1);

/// A connection that is replaced when it breaks or stalls.
pub(super) struct Link {
    server: Arc<Server>,
    options: RedisOptions,
    scripts: Scripts,
    subscribers: Arc<Subscribers>,
    together: Together,
    current: Mutex<Option<Arc<Live>>>,
    /// Whoever waits for a connection has subscribed to it.
    attempts: watch::Sender<Attempts>,
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

/// How often it was tried to connect, and how the last attempt that is over has ended.
#[derive(Default)]
struct Attempts {
    begun: u64,
    over: u64,
    refusal: Option<Refusal>,
}

/// What the one who connects has to know.
struct Turn {
    pace: Pace,
    previous: Option<Peer>,
}

/// A connection in use.
struct Live {
    wire: Wire,
    retired: CancellationToken,
    abandoned: AtomicU32,
    opened_at: Instant,
    answered_at: Mutex<Instant>,
}

impl Link {
    pub(super) fn new(
        server: Arc<Server>,
        options: RedisOptions,
        scripts: Scripts,
        subscribers: Arc<Subscribers>,
    ) -> Self {
        Self {
            server,
            options,
            scripts,
            subscribers,
            together: Together::default(),
            current: Mutex::new(None),
            attempts: watch::Sender::default(),
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
        match self.run(operation, &alone()).await {
            Ok(answer) => Ok(Answer { repeated: repeated || answer.repeated, ..answer }),
            Err(error) if repeated => Err(failure::after_copy(operation, error)),
            Err(error) => Err(error),
        }
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

    /// For how long the server keeps quiet, if it does.
    pub(super) async fn quiet_for(&self, partition: Partition) -> Option<Duration> {
        let counter = request::counter(partition);
        let (mut word, mut left) = (redis::cmd("GET"), redis::cmd("PTTL"));
        word.arg(&counter);
        left.arg(&counter);
        match self.command("inspect", word).await.ok()? {
            Value::BulkString(word) if word == condition::QUIET.as_bytes() => {}
            _ => return None,
        }
        match self.command("inspect", left).await.ok()? {
            Value::Int(ms) => u64::try_from(ms).ok().map(Duration::from_millis),
            _ => None,
        }
    }

    async fn send(
        &self,
        operation: &'static str,
        command: Cow<'_, Cmd>,
        text: impl Fn() -> Option<Cmd>,
    ) -> Result<Answer> {
        let mut repeated = false;
        match self.send_copies(operation, command, text, &mut repeated).await {
            Ok(value) => Ok(Answer { value, repeated }),
            Err(error) if repeated => Err(failure::after_copy(operation, error)),
            Err(error) => Err(error),
        }
    }

    /// Sets `repeated` when the answer to a copy was lost.
    async fn send_copies(
        &self,
        operation: &'static str,
        mut command: Cow<'_, Cmd>,
        text: impl Fn() -> Option<Cmd>,
        repeated: &mut bool,
    ) -> Result<Value> {
        let mut patience = self.patience();
        loop {
            let live = self.live(operation, &mut patience).await?;
            let error = match live.send(&command).await {
                Ok(value) => return Ok(value),
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
                    *repeated = true;
                    if !error.is_io_error() {
                        // Who runs out of time before the next connection is told this.
                        *lock(&self.last_error) = Some(error.clone());
                    }
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
        let mut patience = self.patience();
        loop {
            let live = self.live("subscribe", &mut patience).await?;
            let mut connection = live.wire.connection.clone();
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

    /// Connects for those who wait for it, and as soon as a connection is lost on which somebody
    /// waits for pushes: nobody may be calling then. Unsubscribes what nobody hears any more. Runs
    /// until it is dropped.
    pub(super) async fn keep(self: Arc<Self>) {
        let mut turn = Turn { pace: Pace::new(self.options.reconnect_for), previous: None };
        loop {
            match self.current() {
                Some(live) => {
                    for channel in self.subscribers.take_left() {
                        // A push to nobody is harmless; the next connection asks for none.
                        let mut connection = live.wire.connection.clone();
                        let _ = live.answer(connection.unsubscribe(channel)).await;
                    }
                    tokio::select! {
                        () = live.retired.cancelled() => {}
                        () = self.changed.notified() => {}
                    }
                }
                None if self.is_awaited() => self.attempt(&mut turn).await,
                None if self.subscribers.channels().is_empty() => self.changed.notified().await,
                None => {
                    self.attempt(&mut turn).await;
                    if self.current().is_none() {
                        tracing::debug!("the lock service is out of reach");
                        tokio::select! {
                            () = sleep(self.options.reconnect_for) => {}
                            () = self.changed.notified() => {}
                        }
                    }
                }
            }
        }
    }

    fn patience(&self) -> Patience {
        Patience::new(self.options.reconnect_for)
    }

    fn current(&self) -> Option<Arc<Live>> {
        lock(&self.current).clone().filter(|live| !live.retired.is_cancelled())
    }

    fn is_awaited(&self) -> bool {
        self.attempts.receiver_count() > 0
    }

    /// The connection in use, or a new one.
    async fn live(&self, operation: &'static str, patience: &mut Patience) -> Result<Arc<Live>> {
        if let Some(live) = self.current() {
            return Ok(live);
        }
        let mut attempts = self.attempts.subscribe();
        let begun = attempts.borrow().begun;
        loop {
            // An attempt that had begun before may have met what has been put right since.
            let own = |attempts: &Attempts| {
                attempts.refusal.as_ref().filter(|_| attempts.over > begun).map(Refusal::to_keep)
            };
            let refusal = own(&attempts.borrow_and_update());
            if let Some(live) = self.current() {
                return Ok(live);
            }
            match refusal {
                Some(Refusal::Final(error)) => return Err(error),
                Some(Refusal::Redis(error)) if remedy(&error) == Remedy::GiveUp => {
                    return Err(explain(operation, error));
                }
                _ => self.changed.notify_one(),
            }
            if timeout(patience.left(), attempts.changed()).await.is_err() {
                let error = lock(&self.last_error).clone();
                return Err(
                    error.map_or_else(|| no_answer(operation), |error| explain(operation, error))
                );
            }
        }
    }

    /// Tries to connect, and tells those who wait for it.
    async fn attempt(&self, turn: &mut Turn) {
        let served = lock(&self.current).take().is_some_and(|live| live.has_answered());
        turn.pace.next(served).await;
        self.attempts.send_if_modified(|attempts| {
            attempts.begun += 1;
            false
        });
        let time = self.options.reconnect_for.max(LEAST_ATTEMPT);
        let refusal = match timeout(time, self.connect(turn)).await {
            Ok(outcome) => outcome.err(),
            // Those who wait for it know best for how long they have.
            Err(_) => None,
        };
        if let Some(Refusal::Redis(error)) = &refusal
            && remedy(error) != Remedy::GiveUp
        {
            *lock(&self.last_error) = Some(error.clone());
        }
        self.attempts.send_modify(|attempts| {
            attempts.over = attempts.begun;
            attempts.refusal = refusal;
        });
    }

    async fn connect(&self, turn: &mut Turn) -> Result<(), Refusal> {
        let retired = CancellationToken::new();
        let mut wire = self.server.open(Some(&self.subscribers), retired.clone()).await?;
        let connection = &mut wire.connection;
        turn.previous = greeting::greet(connection, &self.options, turn.previous.as_ref()).await?;
        let channels = self.subscribers.channels();
        if !channels.is_empty() {
            connection.subscribe(channels).await?;
        }
        let opened_at = Instant::now();
        let live = Arc::new(Live {
            wire,
            retired,
            abandoned: AtomicU32::new(0),
            opened_at,
            answered_at: Mutex::new(opened_at),
        });
        *lock(&self.current) = Some(live);
        *lock(&self.last_error) = None;
        Ok(())
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
        let mut connection = self.wire.connection.clone();
        self.answer(greeting::ask(&mut connection, command)).await
    }

    /// Waits for an answer for as long as this connection is the one in use.
    async fn answer<T>(
        &self,
        answer: impl Future<Output = Result<T, RedisError>>,
    ) -> Result<T, RedisError> {
        let mut call = OnItsWay { live: self, since: Instant::now(), answered: false };
        let answer = tokio::select! {
            biased;
            answer = answer => answer,
            () = self.retired.cancelled() => {
                Err(lost_connection())
            }
        };
        call.answered = !matches!(&answer, Err(error) if remedy(error) == Remedy::Reconnect);
        answer
    }

    /// Whether it has been of use to anybody.
    fn has_answered(&self) -> bool {
        *lock(&self.answered_at) > self.opened_at
    }
}

/// A call on its way. Dropped without an answer, it counts against its connection, unless it was
/// given up so soon that no answer could be expected.
struct OnItsWay<'a> {
    live: &'a Live,
    since: Instant,
    answered: bool,
}

impl Drop for OnItsWay<'_> {
    fn drop(&mut self) {
        let Live { abandoned, answered_at, retired, .. } = self.live;
        if self.answered {
            abandoned.store(0, Ordering::Relaxed);
            *lock(answered_at) = Instant::now();
        } else if self.since.elapsed() >= STALLED_FOR
            && abandoned.fetch_add(1, Ordering::Relaxed) + 1 >= STALLED_CALLS
            && lock(answered_at).elapsed() >= STALLED_FOR
        {
            retired.cancel();
        }
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
