//! What goes wrong on purpose while the workers work.

use std::fmt;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::Result;
use crate::crew::Crew;
use crate::servers::Redis;

/// Kills and stops, one thing after the other, until it is dropped.
pub struct Chaos {
    random: fastrand::Rng,
    lease: Duration,
    /// Redis is away for half of the time, and not only for a moment now and then.
    outages: bool,
    next: Instant,
    turn: usize,
    /// What must be put right, and when.
    due: Vec<(Instant, Repair)>,
    counts: Counts,
}

#[derive(Clone, Copy)]
enum Repair {
    Continue(usize),
    StartRedis,
    /// The next outage begins, as long as the time since the last one.
    KillRedis,
}

/// How often what was done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    workers_killed: u32,
    workers_stopped: u32,
    redis_killed: u32,
}

impl Chaos {
    pub fn new(seed: u64, lease: Duration, outages: bool) -> Self {
        let random = fastrand::Rng::with_seed(seed);
        let next = Instant::now() + lease / 2;
        let due = if outages { vec![(next, Repair::KillRedis)] } else { Vec::new() };
        Self { random, lease, outages, next, turn: 0, due, counts: Counts::default() }
    }

    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Waits until something is to be done.
    pub async fn wait(&self) {
        let due = self.due.iter().map(|(at, _)| *at).fold(self.next, Instant::min);
        sleep_until(due).await;
    }

    /// Does what is to be done now; `redis` only if it is a server of our own.
    pub fn act(&mut self, crew: &mut Crew, redis: Option<&mut Redis>) -> Result<()> {
        let mut redis = redis;
        let now = Instant::now();
        let (repairs, later) = self.due.iter().partition(|(at, _)| *at <= now);
        self.due = later;
        for (_, repair) in repairs {
            match (repair, redis.as_deref_mut()) {
                (Repair::Continue(number), _) => crew.signal(number, "CONT")?,
                (Repair::StartRedis, Some(redis)) => {
                    redis.start()?;
                    if self.outages {
                        self.due.push((now + self.lease * 3 / 2, Repair::KillRedis));
                    }
                }
                (Repair::KillRedis, Some(redis)) => {
                    redis.kill()?;
                    self.counts.redis_killed += 1;
                    self.due.push((now + self.lease * 3 / 2, Repair::StartRedis));
                }
                (Repair::StartRedis | Repair::KillRedis, None) => {}
            }
        }
        if now >= self.next {
            // What a victim has locked is free again a lease later, so that some work gets done.
            self.next = now + self.lease.mul_f64(1.0 + self.random.f64());
            self.strike(crew, redis)?;
        }
        Ok(())
    }

    fn strike(&mut self, crew: &mut Crew, redis: Option<&mut Redis>) -> Result<()> {
        let now = Instant::now();
        let working = crew.working();
        let Some(victim) = self.random.choice(working) else { return Ok(()) };
        let redis = redis.filter(|_| !self.outages);
        let kinds = if redis.is_some() { 3 } else { 2 };
        match (self.turn % kinds, redis) {
            (1, Some(redis)) => {
                redis.kill()?;
                self.counts.redis_killed += 1;
                let down = Duration::from_millis(self.random.u64(0..300));
                self.due.push((now + down, Repair::StartRedis));
            }
            (1 | 2, _) => {
                crew.signal(victim, "STOP")?;
                self.counts.workers_stopped += 1;
                self.due.push((now + self.lease * 3 / 2, Repair::Continue(victim)));
            }
            _ => {
                crew.kill(victim)?;
                self.counts.workers_killed += 1;
            }
        }
        self.turn += 1;
        Ok(())
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { workers_killed, workers_stopped, redis_killed } = self;
        write!(f, "workers killed {workers_killed}, stopped for longer than a lease ")?;
        write!(f, "{workers_stopped}; Redis killed {redis_killed}")
    }
}
