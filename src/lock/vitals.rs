//! What the calls to a lock service say about it: whether it is used, and how fast it answers.
//!
//! Every call to the backend goes through a [`Pass`], which bounds it and takes note of how it
//! ended. A service that answers is alive, whatever it answers; what counts against it are answers
//! that it is unavailable, and time-outs of our own. A call whose caller went away counts for
//! nothing.
//!
//! While all is well, a call costs two looks at the clock and a few relaxed atomics.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout};

use crate::backend::{LockBackend, Probe};
use crate::error::{Error, ErrorKind, Result};
use crate::protocol::{Breaker, BreakerOptions, BreakerState, Refused, Ticket};

use crate::types::Status;

use super::health::LockHealth;
use super::statistics;

/// A time-out that was shorter than this part of the usual one says nothing about the service: a
/// short lease leaves little time.
const SHORT: u32 = 10;

/// Whoever asks for the health has a service probed that was not probed for this long.
const PROBE_AGAIN: Duration = Duration::from_secs(5);

/// A watchdog that is this late endangers short leases.
const LATE: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Vitals {
    epoch: Instant,
    call_timeout: Duration,
    /// What can be known of the breaker without its lock.
    glance: AtomicU64,
    inner: Mutex<Inner>,
    /// Something that [`Vitals::trial_due`] has to look at.
    changed: Notify,
    latency: Latency,
    lag: Lag,
    /// Somebody has asked for the health.
    probe_wanted: AtomicBool,
}

#[derive(Debug)]
struct Inner {
    breaker: Breaker,
    last_failure: Option<Arc<Error>>,
    /// When the service was last asked to show its clock, because of the health.
    asked: Option<Instant>,
    /// When it last did, and how far the clock was ahead.
    probed: Option<(Instant, Option<i64>)>,
}

impl Vitals {
    pub(super) fn new(options: BreakerOptions, call_timeout: Duration) -> Self {
        let breaker = Breaker::new(options, call_timeout);
        statistics::breaker_is(breaker.state());
        Self {
            epoch: Instant::now(),
            call_timeout,
            glance: AtomicU64::new(Glance::of(&breaker).0),
            inner: Mutex::new(Inner { breaker, last_failure: None, asked: None, probed: None }),
            changed: Notify::new(),
            latency: Latency::default(),
            lag: Lag::default(),
            probe_wanted: AtomicBool::new(false),
        }
    }

    /// How the service stands. Does no I/O, and has the watchdog do some if the last is long ago.
    pub(super) fn health(&self, closed: bool) -> LockHealth {
        let now = Instant::now();
        let mut inner = self.lock();
        let breaker = inner.breaker.state();
        let lag = self.lag.at(now - self.epoch);
        let (status, reason) = match breaker {
            _ if closed => (Status::Down, Some("this lock service was shut down".to_owned())),
            BreakerState::Closed if inner.breaker.is_calm() => match lag {
                Some(lag) if lag >= LATE => {
                    (Status::Degraded, Some(format!("the watchdog is {lag:.1?} late")))
                }
                _ => (Status::Up, None),
            },
            BreakerState::Closed | BreakerState::HalfOpen => (Status::Degraded, inner.reason()),
            BreakerState::Open => (Status::Down, inner.reason()),
        };
        let last = inner.asked.max(inner.probed.map(|(at, _)| at));
        if last.is_none_or(|at| now.duration_since(at) >= PROBE_AGAIN) {
            inner.asked = Some(now);
            self.probe_wanted.store(true, Ordering::Relaxed);
            self.changed.notify_one();
        }
        let (last_latency, latency) = self.latency.read();
        LockHealth {
            status,
            reason,
            breaker,
            last_latency,
            latency,
            clock_skew_us: inner.probed.and_then(|(_, skew)| skew),
            probed: inner.probed.map(|(at, _)| now.duration_since(at)),
            watchdog_lag: lag,
        }
    }

    /// The watchdog means to look after the leases at `next`, and was `late` just now.
    pub(super) fn watched(&self, next: Option<Instant>, late: Duration) {
        self.lag.note(next.map(|next| next - self.epoch), late);
    }

    /// Asks the service how it is, with leave from [`Vitals::trial_due`].
    pub(super) async fn probe(&self, pass: Pass<'_>, backend: &dyn LockBackend) -> Result<()> {
        let (sent, clock) = (Instant::now(), SystemTime::now());
        let Probe { clock_us } = pass.call(self.call_timeout, backend.probe()).await?;
        let answered = Instant::now();
        let half_way = clock + (answered - sent) / 2;
        let ours = half_way.duration_since(UNIX_EPOCH).unwrap_or_default().as_micros();
        let ours = i64::try_from(ours).unwrap_or(i64::MAX);
        let ahead = |theirs: u64| Some(i64::try_from(theirs).ok()?.saturating_sub(ours));
        self.lock().probed = Some((answered, clock_us.and_then(ahead)));
        Ok(())
    }

    pub(super) fn breaker_state(&self) -> BreakerState {
        self.lock().breaker.state()
    }

    /// The leave for a call that is never refused.
    pub(super) fn pass(&self) -> Pass<'_> {
        self.pass_with(self.glance().ticket())
    }

    /// The leave to ask for locks.
    pub(super) fn admit(&self) -> Result<Pass<'_>> {
        let glance = self.glance();
        if glance.is(Glance::CLOSED) {
            return Ok(self.pass_with(glance.ticket()));
        }
        let mut inner = self.lock();
        let admitted = inner.breaker.admit(self.now());
        match admitted {
            Ok(ticket) => Ok(self.pass_with(ticket)),
            Err(refused) => Err(refusal(refused, inner.last_failure.clone())),
        }
    }

    /// Fails where [`admit`](Vitals::admit) would.
    pub(super) fn check(&self) -> Result<()> {
        if self.glance().is(Glance::CLOSED) {
            return Ok(());
        }
        let inner = self.lock();
        let refused = inner.breaker.check(self.now());
        refused.map_err(|refused| refusal(refused, inner.last_failure.clone()))
    }

    /// Resolves when the service is to be asked whether it is back.
    pub(super) async fn trial_due(&self) -> Pass<'_> {
        loop {
            if self.probe_wanted.swap(false, Ordering::Relaxed) {
                return self.pass();
            }
            let (ticket, at) = {
                let breaker = &mut self.lock().breaker;
                (breaker.ping(self.now()), breaker.ping_at())
            };
            if let Some(ticket) = ticket {
                return self.pass_with(ticket);
            }
            let at = at.and_then(|at| self.epoch.checked_add(at));
            tokio::select! {
                () = self.changed.notified() => {}
                () = sleep_until(at.unwrap_or(self.epoch)), if at.is_some() => {}
            }
        }
    }

    fn pass_with(&self, ticket: Ticket) -> Pass<'_> {
        Pass { vitals: self, ticket, open: true, errors_count: true }
    }

    fn answered(&self, ticket: Ticket, sent: Instant) {
        let now = Instant::now();
        self.latency.note(now - sent);
        if !self.glance().is(Glance::CALM) {
            self.update(|inner| inner.breaker.succeeded(ticket, now - self.epoch));
        }
    }

    fn failed(&self, ticket: Ticket, error: &Error) {
        let failure = Some(Arc::new(error.to_keep()));
        self.update(|inner| {
            inner.last_failure = failure;
            inner.breaker.failed(ticket, self.now(), fastrand::f64());
        });
    }

    fn update(&self, update: impl FnOnce(&mut Inner)) {
        let mut inner = self.lock();
        let before = inner.breaker.state();
        update(&mut inner);
        let after = inner.breaker.state();
        self.glance.store(Glance::of(&inner.breaker).0, Ordering::Release);
        if before == after {
            return;
        }
        // Under the lock, so that the last word is about the present state.
        statistics::breaker_turned(after);
        match (after, &inner.last_failure) {
            (BreakerState::Open, Some(failure)) => {
                tracing::warn!(%failure, "breaker open: no locks are asked for");
            }
            _ => tracing::info!(?before, ?after, "breaker"),
        }
        drop(inner);
        self.changed.notify_one();
    }

    fn glance(&self) -> Glance {
        Glance(self.glance.load(Ordering::Acquire))
    }

    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn reason(&self) -> Option<String> {
        let failure = self.last_failure.as_ref()?;
        let behind = std::error::Error::source(&**failure);
        Some(behind.map_or(failure.to_string(), |behind| format!("{failure}: {behind}")))
    }
}

/// The error of whoever asks while it is open.
fn refusal(Refused { asked_in }: Refused, cause: Option<Arc<Error>>) -> Error {
    let detail = if asked_in.is_zero() {
        "the lock service has failed, and is being asked now whether it works again".to_owned()
    } else {
        format!("the lock service has failed; it is asked again in {} ms", asked_in.as_millis())
    };
    let error = Error::new(ErrorKind::Unavailable, "acquire", detail).with_retry_after(asked_in);
    match cause {
        Some(cause) => error.with_source(cause),
        None => error,
    }
}

/// The leave to make one call. Dropped before the call has ended, it counts for nothing.
#[must_use]
pub(super) struct Pass<'a> {
    vitals: &'a Vitals,
    ticket: Ticket,
    open: bool,
    errors_count: bool,
}

impl Pass<'_> {
    /// For a release: an answer that it is unavailable may only mean that the answer to a first
    /// copy was lost, so it counts for nothing.
    pub(super) fn of_release(mut self) -> Self {
        self.errors_count = false;
        self
    }

    /// Makes the call, for `limit` at the longest, and takes note of how it ended.
    pub(super) async fn call<T>(
        mut self,
        limit: Duration,
        call: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let sent = Instant::now();
        let (answer, counts) = match timeout(limit, call).await {
            Ok(answer) => (answer, self.errors_count),
            Err(_) => {
                let detail = format!("the lock service did not answer within {limit:?}");
                let long = limit.saturating_mul(SHORT) >= self.vitals.call_timeout;
                // If it is noticed so late, it was this process that stood still.
                let in_time = sent.elapsed() <= limit.saturating_add(limit / 2);
                (Err(Error::new(ErrorKind::Unavailable, "call", detail)), long && in_time)
            }
        };
        match &answer {
            Err(error) if error.is_unavailable() => {
                if counts {
                    self.open = false;
                    self.vitals.failed(self.ticket, error);
                }
            }
            _ => {
                self.open = false;
                self.vitals.answered(self.ticket, sent);
            }
        }
        answer
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if self.open && matches!(self.ticket, Ticket::Trial { .. }) {
            self.vitals.update(|inner| inner.breaker.abandoned(self.ticket));
            self.vitals.changed.notify_one();
        }
    }
}

/// The era of the breaker, and two bits.
#[derive(Clone, Copy)]
struct Glance(u64);

impl Glance {
    const CLOSED: u64 = 1;
    /// Closed, and a success would change nothing.
    const CALM: u64 = 2;

    fn of(breaker: &Breaker) -> Self {
        let bit = |is: bool, bit: u64| if is { bit } else { 0 };
        let closed = bit(breaker.state() == BreakerState::Closed, Self::CLOSED);
        Self(breaker.era() << 2 | closed | bit(breaker.is_calm(), Self::CALM))
    }

    fn is(self, bit: u64) -> bool {
        self.0 & bit != 0
    }

    fn ticket(self) -> Ticket {
        Ticket::Call { era: self.0 >> 2 }
    }
}

/// How long answers take, in nanoseconds. Two that come at once may count as one.
#[derive(Debug, Default)]
struct Latency {
    last: AtomicU64,
    smoothed: AtomicU64,
}

impl Latency {
    fn note(&self, took: Duration) {
        let last = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let before = self.smoothed.load(Ordering::Relaxed);
        let smoothed = if before == 0 { last } else { before - before / 8 + last / 8 };
        self.last.store(last, Ordering::Relaxed);
        self.smoothed.store(smoothed.max(1), Ordering::Relaxed);
    }

    /// The last and the smoothed one, once there is any.
    fn read(&self) -> (Option<Duration>, Option<Duration>) {
        let smoothed = self.smoothed.load(Ordering::Relaxed);
        let last = Duration::from_nanos(self.last.load(Ordering::Relaxed));
        (smoothed > 0).then(|| (last, Duration::from_nanos(smoothed))).unzip()
    }
}

/// How late the watchdog is, in nanoseconds.
#[derive(Debug, Default)]
struct Lag {
    /// When it means to work again, since the epoch; 0 without anything to do.
    next: AtomicU64,
    /// How late it was last, plus one; 0 before it was ever due.
    last: AtomicU64,
}

impl Lag {
    fn note(&self, next: Option<Duration>, late: Duration) {
        let nanos = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.next.store(next.map_or(0, nanos), Ordering::Relaxed);
        // Without anything to do it is late no more, and there may be no next time to show it.
        if !late.is_zero() || (next.is_none() && self.last.load(Ordering::Relaxed) > 0) {
            self.last.store(nanos(late).saturating_add(1), Ordering::Relaxed);
        }
    }

    fn at(&self, now: Duration) -> Option<Duration> {
        let next = Duration::from_nanos(self.next.load(Ordering::Relaxed));
        let overdue = if next.is_zero() { Duration::ZERO } else { now.saturating_sub(next) };
        let last = self.last.load(Ordering::Relaxed).checked_sub(1);
        let last = last.map(Duration::from_nanos);
        if overdue.is_zero() { last } else { last.max(Some(overdue)) }
    }
}
