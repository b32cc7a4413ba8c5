//! When a service is left alone for a while, and when it is used again.
//!
//! Three states, and in each of them something else counts:
//!
//! | state | what passes | what counts |
//! |---|---|---|
//! | closed | everything | the answer of every call: too many failures open it |
//! | open | nothing | a ping, made in time: success half-opens it, failure makes it wait longer |
//! | half-open | one call, the probe | its answer: success closes, failure opens again |
//!
//! Calls that are never refused, such as a renewal, go on in every state, and count where it is
//! closed.
//!
//! # Why a probe after the ping
//! A server may answer a ping and still do no work: out of memory, without replicas, a replica
//! itself. Only a call of the kind that was refused shows that it does.
//!
//! # Why late answers count for nothing
//! An answer counts in the era in which its call was sent; each change of the state begins a new
//! one. A call that was sent before it opened and is answered after says what the service was like
//! then: its success must not close what a probe has not proven, and its failure must not open
//! again what one has.
//!
//! # Why a probe has an end
//! Whoever drops the future of a probe gives it back. One that is kept and never polled cannot, so
//! that after its time another caller may be the probe. There is never more than one within its
//! time.
//!
//! # Why the window begins with a failure
//! What went well before says nothing about now, and need not be counted: while all is well, the
//! breaker has nothing to remember.

use std::time::Duration;

use super::Backoff;

/// When a breaker opens, and for how long.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct BreakerOptions {
    /// Whether it opens at all. If not, it still tells whether calls have failed.
    pub enabled: bool,
    /// It opens after this many failures without a success in between.
    pub in_a_row: u32,
    /// It opens when this part of the calls, 0 to 1, has failed since the first failure ...
    pub share: f64,
    /// ... if there were at least this many ...
    pub calls: u32,
    /// ... and the first failure was no longer ago than this.
    pub window: Duration,
    /// How long it stays open before the service is asked whether it is back. Its `max_elapsed`
    /// counts for nothing.
    pub open: Backoff,
}

impl Default for BreakerOptions {
    /// Three failures in a row, or half of ten calls or more within 10 s; open for 100 ms at first
    /// and for at most 800 ms, so that a service that is back is used within a second.
    fn default() -> Self {
        let open = Backoff {
            first: Duration::from_millis(100),
            max: Duration::from_millis(800),
            ..Backoff::default()
        };
        Self {
            enabled: true,
            in_a_row: 3,
            share: 0.5,
            calls: 10,
            window: Duration::from_secs(10),
            open,
        }
    }
}

/// What a breaker lets through.
// exhaustive: the three states that the literature knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BreakerState {
    /// Everything.
    Closed,
    /// One call, to see whether the service works again.
    HalfOpen,
    /// Nothing.
    Open,
}

/// What a call shows when it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[must_use = "a trial that is not settled keeps others from being made"]
// exhaustive: a call decides about the state alone, or with others.
pub enum Ticket {
    /// One call among others, sent in this era.
    Call {
        /// How often the state had changed.
        era: u64,
    },
    /// A ping or a probe.
    Trial {
        /// Each has another number.
        number: u64,
    },
}

/// A call is not to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// In how long the service is asked again; zero when that is under way.
    pub asked_in: Duration,
}

/// Decides whether a service is called. Times count from any fixed moment.
#[derive(Clone, Debug)]
pub struct Breaker {
    options: BreakerOptions,
    /// After this time nobody will say how a trial has ended.
    patience: Duration,
    state: State,
    era: u64,
    trials: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum State {
    Closed(Option<Trouble>),
    /// Not asked before `until`; `failed` trials in a row have failed.
    Open {
        until: Duration,
        failed: u32,
        ping: Option<Trial>,
    },
    HalfOpen {
        failed: u32,
        probe: Option<Trial>,
    },
}

/// What happened since a first failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Trouble {
    since: Duration,
    calls: u32,
    failures: u32,
    /// Failures without a success in between.
    row: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Trial {
    number: u64,
    until: Duration,
}

impl Breaker {
    /// A closed one, for calls that end after `limit` at the latest. A trial is waited for a
    /// quarter longer, so that its end is heard of before another one begins.
    #[must_use]
    pub fn new(options: BreakerOptions, limit: Duration) -> Self {
        let patience = limit.saturating_add(limit / 4);
        Self { options, patience, state: State::Closed(None), era: 0, trials: 0 }
    }

    /// What it lets through.
    #[must_use]
    pub fn state(&self) -> BreakerState {
        match self.state {
            State::Closed(_) => BreakerState::Closed,
            State::Open { .. } => BreakerState::Open,
            State::HalfOpen { .. } => BreakerState::HalfOpen,
        }
    }

    /// Whether it is closed and remembers no failure, so that a success changes nothing.
    #[must_use]
    pub fn is_calm(&self) -> bool {
        self.state == State::Closed(None)
    }

    /// How often the state has changed: the era of calls that are sent now.
    #[must_use]
    pub fn era(&self) -> u64 {
        self.era
    }

    /// Lets a call through, or not.
    ///
    /// # Errors
    /// [`Refused`] while it is open, or half-open with a probe under way.
    pub fn admit(&mut self, now: Duration) -> Result<Ticket, Refused> {
        match self.state {
            State::Closed(_) => Ok(Ticket::Call { era: self.era }),
            State::Open { until, .. } => Err(Refused { asked_in: until.saturating_sub(now) }),
            State::HalfOpen { probe: Some(probe), .. } if now < probe.until => {
                Err(Refused { asked_in: Duration::ZERO })
            }
            State::HalfOpen { failed, .. } => {
                let probe = self.trial(now);
                self.state = State::HalfOpen { failed, probe: Some(probe) };
                Ok(Ticket::Trial { number: probe.number })
            }
        }
    }

    /// Whether [`admit`](Breaker::admit) would refuse. Changes nothing.
    ///
    /// # Errors
    /// As [`Breaker::admit`].
    pub fn check(&self, now: Duration) -> Result<(), Refused> {
        self.clone().admit(now).map(drop)
    }

    /// The ping that is to be made now, if there is one.
    pub fn ping(&mut self, now: Duration) -> Option<Ticket> {
        let State::Open { until, failed, .. } = self.state else { return None };
        if self.ping_at().is_none_or(|at| now < at) {
            return None;
        }
        let ping = self.trial(now);
        self.state = State::Open { until, failed, ping: Some(ping) };
        Some(Ticket::Trial { number: ping.number })
    }

    /// When [`ping`](Breaker::ping) is worth asking; `None` unless it is open.
    #[must_use]
    pub fn ping_at(&self) -> Option<Duration> {
        match self.state {
            State::Open { until, ping, .. } => Some(ping.map_or(until, |ping| ping.until)),
            State::Closed(_) | State::HalfOpen { .. } => None,
        }
    }

    /// A call was answered.
    pub fn succeeded(&mut self, ticket: Ticket, now: Duration) {
        match (self.state, ticket) {
            (State::Closed(Some(trouble)), Ticket::Call { era }) if era == self.era => {
                let trouble = (!trouble.is_past(now, &self.options)).then(|| Trouble {
                    calls: trouble.calls.saturating_add(1),
                    row: 0,
                    ..trouble
                });
                self.state = State::Closed(trouble);
            }
            (State::Open { failed, ping, .. }, ticket) if is(ping, ticket) => {
                self.enter(State::HalfOpen { failed, probe: None });
            }
            (State::HalfOpen { probe, .. }, ticket) if is(probe, ticket) => {
                self.enter(State::Closed(None));
            }
            _ => {}
        }
    }

    /// A call failed. `chance` is a random number in `0.0..1.0`.
    pub fn failed(&mut self, ticket: Ticket, now: Duration, chance: f64) {
        match (self.state, ticket) {
            (State::Closed(trouble), Ticket::Call { era }) if era == self.era => {
                let trouble = Trouble::more(trouble, now, &self.options);
                if self.options.enabled && trouble.is_enough(&self.options) {
                    self.enter(self.open(0, now, chance));
                } else {
                    self.state = State::Closed(Some(trouble));
                }
            }
            // Still the same outage: no new era.
            (State::Open { failed, ping, .. }, ticket) if is(ping, ticket) => {
                self.state = self.open(failed.saturating_add(1), now, chance);
            }
            (State::HalfOpen { failed, probe }, ticket) if is(probe, ticket) => {
                self.enter(self.open(failed.saturating_add(1), now, chance));
            }
            _ => {}
        }
    }

    /// Nobody waits for the answer of a call any more. A trial may be made by somebody else.
    pub fn abandoned(&mut self, ticket: Ticket) {
        match &mut self.state {
            State::Open { ping: trial, .. } | State::HalfOpen { probe: trial, .. } => {
                trial.take_if(|trial| is(Some(*trial), ticket));
            }
            State::Closed(_) => {}
        }
    }

    fn trial(&mut self, now: Duration) -> Trial {
        self.trials += 1;
        Trial { number: self.trials, until: now.saturating_add(self.patience) }
    }

    fn open(&self, failed: u32, now: Duration, chance: f64) -> State {
        let open = Backoff { max_elapsed: Duration::MAX, ..self.options.open };
        let wait = open.delay(failed, chance, Duration::ZERO).unwrap_or(open.max);
        State::Open { until: now.saturating_add(wait), failed, ping: None }
    }

    fn enter(&mut self, state: State) {
        self.state = state;
        self.era += 1;
    }
}

impl Trouble {
    /// Adds a failure. What is past is forgotten, but for failures that no success has ended.
    fn more(trouble: Option<Self>, now: Duration, options: &BreakerOptions) -> Self {
        let row = trouble.map_or(0, |trouble| trouble.row).saturating_add(1);
        match trouble.filter(|trouble| !trouble.is_past(now, options)) {
            Some(Self { since, calls, failures, .. }) => Self {
                since,
                calls: calls.saturating_add(1),
                failures: failures.saturating_add(1),
                row,
            },
            None => Self { since: now, calls: 1, failures: 1, row },
        }
    }

    fn is_past(&self, now: Duration, options: &BreakerOptions) -> bool {
        now.saturating_sub(self.since) > options.window
    }

    fn is_enough(&self, options: &BreakerOptions) -> bool {
        let share = f64::from(self.failures) / f64::from(self.calls.max(1));
        self.row >= options.in_a_row || (self.calls >= options.calls && share >= options.share)
    }
}

/// Whether the ticket is that of the trial.
fn is(trial: Option<Trial>, ticket: Ticket) -> bool {
    trial.is_some_and(|trial| Ticket::Trial { number: trial.number } == ticket)
}

#[cfg(test)]
mod tests;
