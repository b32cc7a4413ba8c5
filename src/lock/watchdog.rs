//! The one task of a lock service: it renews, refreshes, and settles what was dropped.
//!
//! Leases that are due together are renewed in one call per partition; calls run side by side, each
//! with a time-out of its own, so that a slow partition delays nobody else. Leases with little time
//! left are sent apart from those with much, because the time-out of a call is that of its most
//! urgent lease. Releases have places of their own, so that many of them hold up no renewal.
//!
//! While the breaker is open, it is this task that asks whether the service is back, so that no
//! caller has to wait for that.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::Instant;

use crate::backend::LockBackend;
use crate::error::Result;
use crate::protocol::{Renewal, Renewals, Renewed};
use crate::types::Partition;

use super::hold::Kept;
use super::schedule::{Job, Schedule, Settle};
use super::statistics::Counters;
use super::vitals::{Pass, Vitals};
use super::wait::Waiting;
use super::wakefulness::Wakefulness;

/// The most requests in one renewal call, and the most keys.
const BATCH: usize = 100;
const BATCH_KEYS: usize = 1_000;
/// The most background releases under way at once. Renewals are bounded by what is held.
const SETTLING: usize = 64;
/// The least time that a refresh gets, however short the lease.
const LEAST_ATTEMPT: Duration = Duration::from_millis(50);
/// How long a failed background release waits for its next attempt.
const SETTLE_AGAIN: Duration = Duration::from_millis(200);

pub(super) struct Watchdog {
    pub(super) schedule: Arc<Schedule>,
    pub(super) backend: Arc<dyn LockBackend>,
    pub(super) counters: Arc<Counters>,
    pub(super) vitals: Arc<Vitals>,
    pub(super) wakefulness: Arc<Wakefulness>,
    pub(super) call_timeout: Duration,
}

/// Marks the schedule as dead however the task ends, so that nobody trusts in renewals.
struct Alive(Arc<Schedule>);

impl Drop for Alive {
    fn drop(&mut self) {
        self.0.die();
    }
}

impl Watchdog {
    /// Runs until the schedule is stopped and empty.
    pub(super) fn run(self) -> impl Future<Output = ()> + Send {
        // Not within the future, which is dropped unpolled when its runtime is shut down.
        let alive = Alive(Arc::clone(&self.schedule));
        async move {
            let _alive = alive;
            self.watch().await;
        }
    }

    async fn watch(&self) {
        let mut renewing = FuturesUnordered::new();
        let mut settling = FuturesUnordered::new();
        let mut asking = FuturesUnordered::new();
        let mut dropped = VecDeque::new();
        let mut next = None;
        while !self.schedule.is_finished() {
            self.wakefulness.slept();
            let now = Instant::now();
            let late = next.map_or(Duration::ZERO, |next| now.saturating_duration_since(next));
            let due = self.schedule.take_due(now);
            for (partition, jobs) in self.batches(due, &mut dropped) {
                renewing.push(self.renew(partition, jobs));
            }
            while settling.len() < SETTLING
                && let Some(settle) = dropped.pop_front()
            {
                settling.push(self.settle(settle));
            }
            next = self.schedule.next_due(Instant::now());
            self.vitals.watched(next, late);
            tokio::select! {
                () = self.schedule.changed() => {}
                () = sleep_until(next) => {}
                Some(()) = renewing.next(), if !renewing.is_empty() => {}
                Some(()) = settling.next(), if !settling.is_empty() => {}
                pass = self.vitals.trial_due() => asking.push(self.ask(pass)),
                Some(()) = asking.next(), if !asking.is_empty() => {}
            }
        }
    }

    /// Sorts jobs into calls, and leaves out those whose lease is over.
    fn batches(
        &self,
        due: Vec<Job>,
        dropped: &mut VecDeque<Arc<Settle>>,
    ) -> Vec<(Partition, Vec<(Job, Renewal)>)> {
        let now = Instant::now();
        let mut batches = Vec::new();
        let mut open: BTreeMap<(Partition, u32), Vec<(Job, Renewal)>> = BTreeMap::new();
        for job in due {
            let (partition, urgency) = match &job {
                Job::Settle(settle) => {
                    dropped.push_back(Arc::clone(settle));
                    continue;
                }
                Job::Keep(kept) => match self.urgency(kept, now) {
                    Some(urgency) => (kept.part.partition, urgency),
                    None => continue,
                },
                Job::Wait(waiting) => (waiting.part.partition, u32::MAX),
            };
            let Some(renewal) = job.renewal() else { continue };
            let batch = open.entry((partition, urgency)).or_default();
            batch.push((job, renewal));
            let keys: usize = batch.iter().map(|(_, renewal)| renewal.part.wants.len()).sum();
            if batch.len() >= BATCH || keys >= BATCH_KEYS {
                batches.push((partition, std::mem::take(batch)));
            }
        }
        let rest = open.into_iter().filter(|(_, jobs)| !jobs.is_empty());
        batches.extend(rest.map(|((partition, _), jobs)| (partition, jobs)));
        batches
    }

    /// Whether a grant is renewed now, and with how much time left: the same number, about the
    /// same.
    fn urgency(&self, kept: &Arc<Kept>, now: Instant) -> Option<u32> {
        let request = kept.part.request;
        let job = Job::Keep(Arc::clone(kept));
        if !kept.is_held() {
            self.lose(kept);
            return None;
        }
        let deadline = kept.deadline().unwrap_or(now);
        let confirmed = kept.is_confirmed();
        if confirmed && (!kept.renews || now >= kept.last()) {
            self.schedule.again(request, &job, kept.next_look(deadline));
            return None;
        }
        let millis = deadline.saturating_duration_since(now).as_millis();
        Some(millis.max(1).ilog2())
    }

    async fn renew(&self, partition: Partition, jobs: Vec<(Job, Renewal)>) {
        let (slept, sent) = (self.wakefulness.slept(), Instant::now());
        let (jobs, renewals): (Vec<Job>, Vec<Renewal>) = jobs.into_iter().unzip();
        let limit = jobs.iter().filter_map(|job| job.attempt(sent)).min();
        let limit = limit.unwrap_or(self.call_timeout).min(self.call_timeout);
        let call = self.backend.renew(partition, &renewals);
        let answer = match self.vitals.pass().call(limit, call).await {
            Ok(answers) if answers.len() == jobs.len() => Ok(answers),
            Ok(_) => Err("the lock service left renewals unanswered".to_owned()),
            Err(error) => Err(error.to_string()),
        };
        match answer {
            Ok(answers) => {
                let sent = self.wakefulness.sent(sent, slept);
                for (job, renewed) in jobs.iter().zip(answers) {
                    self.apply(job, renewed, sent);
                }
            }
            Err(reason) => {
                tracing::warn!(%partition, leases = jobs.len(), reason, "renewal failed");
                jobs.iter().for_each(|job| self.retry(job));
            }
        }
    }

    fn apply(&self, job: &Job, renewed: Renewed, sent: Instant) {
        match (job, renewed) {
            (Job::Keep(kept), Renewed::Held(_)) => {
                if !kept.renewed(sent) {
                    return self.lose(kept);
                }
                let lease = kept.lease;
                self.counters.renewed();
                let interval = Renewals::new(lease).after_success();
                let due = self.schedule.aligned(sent + interval, interval);
                let ends = sent + lease.get() - lease.drift();
                let due = if kept.renews { due } else { kept.next_look(ends) };
                self.schedule.again(kept.part.request, job, due);
            }
            (Job::Keep(kept), _) => self.lose(kept),
            (Job::Wait(waiting), Renewed::Held(Some(grant))) => waiting.granted(grant, sent),
            (Job::Wait(waiting), Renewed::Queued { ask_again_in }) => {
                waiting.queued(sent);
                self.refresh_in(waiting, ask_again_in);
            }
            (Job::Wait(waiting), _) => waiting.forgotten(),
            (Job::Settle(_), _) => {}
        }
    }

    /// The call failed: whatever became of it, sending it again is harmless.
    fn retry(&self, job: &Job) {
        let now = Instant::now();
        match job {
            Job::Keep(kept) => {
                if let Some(lane) = &kept.lane {
                    lane.set_unanswered(true);
                }
                let deadline = kept.deadline().unwrap_or(now);
                let wait = Renewals::new(kept.lease).after_failure(deadline - now);
                self.schedule.again(kept.part.request, job, (now + wait).min(deadline));
            }
            Job::Wait(waiting) => {
                waiting.unanswered();
                self.refresh_in(waiting, waiting.lease.refresh() / 4);
            }
            Job::Settle(_) => {}
        }
    }

    fn refresh_in(&self, waiting: &Arc<Waiting>, wait: Duration) {
        let refresh = waiting.lease.refresh();
        let at = Instant::now() + wait.min(refresh);
        let at = if wait < refresh { at } else { self.schedule.aligned(at, refresh) };
        self.schedule.again(waiting.part.request, &Job::Wait(Arc::clone(waiting)), at);
    }

    /// Tells everyone who works under a grant that it is over.
    fn lose(&self, kept: &Arc<Kept>) {
        let part = &kept.part;
        if !self.schedule.done(part.request, &Job::Keep(Arc::clone(kept))) {
            // It was given up meanwhile, so that the service knows it no more is as it should be.
            return;
        }
        kept.lose();
        self.counters.lost();
        tracing::warn!(owner = %part.owner, keys = ?part.wants, "lease lost");
    }

    async fn settle(&self, settle: Arc<Settle>) {
        let job = Job::Settle(Arc::clone(&settle));
        let pass = self.vitals.pass().of_release();
        let failed = pass.call(self.call_timeout, self.settle_once(&settle)).await.err();
        let now = Instant::now();
        match failed {
            Some(error) if now < settle.until => {
                tracing::debug!(%error, "background release failed; it is tried again");
                self.schedule.again(settle.part.request, &job, now + SETTLE_AGAIN);
            }
            Some(error) => {
                tracing::warn!(%error, owner = %settle.part.owner, "release left to expire");
                self.schedule.done(settle.part.request, &job);
            }
            None => {
                self.schedule.done(settle.part.request, &job);
            }
        }
    }

    /// Asks whether the service is back; the breaker takes note of the answer.
    async fn ask(&self, pass: Pass<'_>) {
        if let Err(error) = self.vitals.probe(pass, &*self.backend).await {
            tracing::debug!(%error, "the lock service is not back");
        }
    }

    async fn settle_once(&self, settle: &Settle) -> Result<()> {
        if settle.cancel {
            self.backend.cancel(&settle.part).await
        } else {
            self.backend.release(&settle.part).await.map(|_| ())
        }
    }
}

impl Job {
    /// What is sent for it; nothing for what is only to be settled.
    fn renewal(&self) -> Option<Renewal> {
        let (part, lease, waiting) = match self {
            Job::Keep(kept) => (&kept.part, kept.lease, false),
            Job::Wait(waiting) => (&waiting.part, waiting.lease, true),
            Job::Settle(_) => return None,
        };
        Some(Renewal { part: part.clone(), lease, waiting })
    }

    /// How long the call may take so that another attempt fits into the lease.
    fn attempt(&self, now: Instant) -> Option<Duration> {
        let kept = match self {
            Job::Keep(kept) => kept,
            // Two more refreshes fit into the life of a waiter.
            Job::Wait(waiting) => return Some(waiting.lease.refresh().max(LEAST_ATTEMPT)),
            Job::Settle(_) => return None,
        };
        let remaining = kept.deadline()?.saturating_duration_since(now);
        Some(Renewals::new(kept.lease).attempt(remaining))
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
