//! What the watchdog has to do, and when.
//!
//! Holders and waiters enter and leave this table without waking the watchdog, unless they are due
//! before it means to wake anyway; the common case of a lock that is held for less than a third of
//! its lease costs a few map operations and no wake-up.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::protocol::{Followed, Grant, Part};
use crate::types::{IdMap, OwnerId, RequestId};

use super::hold::Kept;
use super::wait::Waiting;

/// How long the watchdog stays at hand when there is nothing left to do: less than a third of the
/// interval after which all but the shortest leases are renewed.
const LINGER: Duration = Duration::from_millis(100);

#[derive(Debug)]
pub(super) struct Schedule {
    table: Mutex<Table>,
    changed: Notify,
    emptied: Notify,
    epoch: Instant,
}

#[derive(Debug, Default)]
struct Table {
    jobs: IdMap<RequestId, (Job, Option<Instant>)>,
    due: BTreeSet<(Instant, RequestId)>,
    wakes_at: Option<Instant>,
    /// Whether anything was put in since the watchdog last found nothing to do.
    used: bool,
    stopping: bool,
    dead: bool,
}

/// One thing to keep an eye on. A request has at most one.
#[derive(Clone, Debug)]
pub(super) enum Job {
    /// Renew, or only watch the deadline.
    Keep(Arc<Kept>),
    /// Refresh.
    Wait(Arc<Waiting>),
    /// Release or cancel in the background, until it works or does not matter any more.
    Settle(Arc<Settle>),
}

impl Job {
    fn kept(&self) -> Option<&Arc<Kept>> {
        match self {
            Job::Keep(kept) => Some(kept),
            Job::Wait(_) | Job::Settle(_) => None,
        }
    }

    /// Nobody will look after it any more.
    fn forsake(self) {
        match self {
            Job::Keep(kept) => kept.lose(),
            Job::Wait(waiting) => waiting.forgotten(),
            Job::Settle(_) => {}
        }
    }

    fn is_like(&self, other: &Job) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }
}

/// A grant or a request to get rid of.
#[derive(Debug)]
pub(super) struct Settle {
    pub(super) part: Part,
    /// Whether the request may still be on its way or in line; else it is known to be a grant.
    pub(super) cancel: bool,
    /// When what is left of it has lapsed by itself.
    pub(super) until: Instant,
}

impl Schedule {
    pub(super) fn new() -> Self {
        Self {
            table: Mutex::default(),
            changed: Notify::new(),
            emptied: Notify::new(),
            epoch: Instant::now(),
        }
    }

    /// Puts a job in, in the place of what the request had before. Without a time it only listens.
    /// One that comes after the watchdog has ended is treated as those that it left behind.
    pub(super) fn put(&self, request: RequestId, job: Job, due: Option<Instant>) {
        let mut table = self.lock();
        if table.dead {
            drop(table);
            return job.forsake();
        }
        table.take(request);
        table.jobs.insert(request, (job, due));
        let Some(due) = due else { return };
        table.due.insert((due, request));
        table.used = true;
        self.wake(table, due);
    }

    /// Sets the next time of a job that is still there and is still of the same kind.
    pub(super) fn again(&self, request: RequestId, kind: &Job, due: Instant) {
        self.set(request, kind, due, |_| true);
    }

    /// As [`Schedule::again`], for a job that is planned for later; one under way is left alone.
    pub(super) fn sooner(&self, request: RequestId, kind: &Job, due: Instant) {
        self.set(request, kind, due, |at| at.is_some_and(|at| at > due));
    }

    fn set(
        &self,
        request: RequestId,
        kind: &Job,
        due: Instant,
        when: impl FnOnce(Option<Instant>) -> bool,
    ) {
        let mut table = self.lock();
        if let Some((job, at)) = table.jobs.get_mut(&request)
            && job.is_like(kind)
            && when(*at)
        {
            let old = at.replace(due);
            if let Some(old) = old {
                table.due.remove(&(old, request));
            }
            table.due.insert((due, request));
            self.wake(table, due);
        }
    }

    /// Wakes the watchdog if it means to sleep beyond `due`.
    fn wake(&self, table: MutexGuard<'_, Table>, due: Instant) {
        let sooner = table.wakes_at.is_none_or(|wakes_at| due < wakes_at);
        drop(table);
        if sooner {
            self.changed.notify_one();
        }
    }

    /// Takes a job out.
    pub(super) fn remove(&self, request: RequestId) {
        let mut table = self.lock();
        table.take(request);
        if table.jobs.is_empty() {
            self.emptied.notify_waiters();
        }
    }

    /// Takes a job out if it is still of the same kind, as it was when it was started; says whether
    /// it was.
    pub(super) fn done(&self, request: RequestId, kind: &Job) -> bool {
        let mut table = self.lock();
        let same = table.jobs.get(&request).is_some_and(|(job, _)| job.is_like(kind));
        if same {
            table.take(request);
        }
        if table.jobs.is_empty() {
            self.emptied.notify_waiters();
        }
        same
    }

    /// Takes a request out that only listened or waited.
    pub(super) fn forget_wait(&self, request: RequestId) {
        let mut table = self.lock();
        if matches!(table.jobs.get(&request), Some((Job::Wait(_), _))) {
            table.take(request);
        }
        if table.jobs.is_empty() {
            self.emptied.notify_waiters();
        }
    }

    /// Tells a waiter of a grant that was pushed. One that is not waited for here is ignored: it
    /// was cancelled meanwhile, and the cancel is on its way.
    pub(super) fn hand_over(&self, owner: OwnerId, grant: Grant) {
        let waiting = match self.lock().jobs.get(&grant.request) {
            Some((Job::Wait(waiting), _)) if waiting.part.owner == owner => Arc::clone(waiting),
            _ => return,
        };
        waiting.pushed(grant);
    }

    /// Tells the lane of a request that somebody stands behind it.
    pub(super) fn followed(&self, by: Followed) {
        let lane = match self.lock().jobs.get(&by.request) {
            Some((Job::Wait(waiting), _)) => waiting.lane.clone(),
            Some((Job::Keep(kept), _)) => kept.lane.clone(),
            _ => None,
        };
        if let Some(lane) = lane.filter(|lane| lane.owner() == by.owner) {
            lane.follow();
        }
    }

    /// The jobs that are due. They stay in the table, without a time.
    pub(super) fn take_due(&self, now: Instant) -> Vec<Job> {
        let mut table = self.lock();
        let mut taken = Vec::new();
        while let Some((at, request)) = table.due.first().copied()
            && at <= now
        {
            table.due.pop_first();
            if let Some((job, due)) = table.jobs.get_mut(&request) {
                *due = None;
                taken.push(job.clone());
            }
        }
        taken
    }

    /// When the watchdog looks again; from now on only earlier jobs wake it. In an empty table that
    /// is in use it looks again soon: else each of the locks that come and go would wake it.
    pub(super) fn next_due(&self, now: Instant) -> Option<Instant> {
        let mut table = self.lock();
        let nap = table.wakes_at.filter(|at| *at > now);
        let lingers = std::mem::take(&mut table.used).then(|| now + LINGER);
        table.wakes_at = table.due.first().map(|(due, _)| *due).or(nap).or(lingers);
        table.wakes_at
    }

    /// Resolves when something may be due earlier than [`Schedule::next_due`] said.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Resolves when there is nothing in the table.
    pub(super) async fn emptied(&self) {
        loop {
            let emptied = self.emptied.notified();
            if self.lock().jobs.is_empty() {
                return;
            }
            emptied.await;
        }
    }

    /// Takes everything away that is held, and settles it in the background. Returns how much it
    /// was.
    pub(super) fn take_away(&self, now: Instant) -> usize {
        let mut table = self.lock();
        let kept: Vec<_> = table.jobs.values().filter_map(|(job, _)| job.kept().cloned()).collect();
        for kept in &kept {
            let (part, until) = (kept.part.clone(), now + kept.lease.get());
            let request = part.request;
            table.take(request);
            let settle = Job::Settle(Arc::new(Settle { part, cancel: false, until }));
            table.jobs.insert(request, (settle, Some(now)));
            table.due.insert((now, request));
        }
        drop(table);
        kept.iter().for_each(|kept| kept.lose());
        self.changed.notify_one();
        kept.len()
    }

    /// The host was suspended for `by`: every lease is shorter by as much. What is held is looked
    /// after now.
    pub(super) fn slept(&self, by: Duration, now: Instant) {
        let jobs: Vec<Job> = self.lock().jobs.values().map(|(job, _)| job.clone()).collect();
        for job in jobs {
            match &job {
                Job::Keep(kept) => {
                    kept.slept(by);
                    self.again(kept.part.request, &job, now);
                }
                Job::Wait(waiting) => waiting.slept(by),
                Job::Settle(_) => {}
            }
        }
    }

    /// Nothing new will come: the watchdog ends when it has settled what is there.
    pub(super) fn stop(&self) {
        self.lock().stopping = true;
        self.changed.notify_one();
    }

    /// Whether the watchdog may end.
    pub(super) fn is_finished(&self) -> bool {
        let table = self.lock();
        table.stopping && table.jobs.is_empty()
    }

    /// The watchdog has ended: nothing is renewed any more, so nothing is held any more.
    pub(super) fn die(&self) {
        let mut table = self.lock();
        table.dead = true;
        table.due.clear();
        let jobs = std::mem::take(&mut table.jobs);
        drop(table);
        jobs.into_values().for_each(|(job, _)| job.forsake());
        self.emptied.notify_waiters();
    }

    /// Whether the watchdog still runs.
    pub(super) fn is_alive(&self) -> bool {
        !self.lock().dead
    }

    /// Rounds `at` down to a grid of an eighth of `interval`, so that what is due at about the same
    /// time is sent in one call.
    pub(super) fn aligned(&self, at: Instant, interval: Duration) -> Instant {
        let grid = (interval / 8).as_micros().max(1_000);
        let since = at.saturating_duration_since(self.epoch).as_micros();
        let down = u64::try_from(since % grid).unwrap_or(0);
        at - Duration::from_micros(down)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn take(&mut self, request: RequestId) {
        if let Some((_, Some(due))) = self.jobs.remove(&request) {
            self.due.remove(&(due, request));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{ClientId, Lease, LeaseState, OwnerId, Partition};

    fn kept(state: &Arc<LeaseState>, now: Instant, lease: Duration) -> Arc<Kept> {
        let owner = OwnerId::new(ClientId::random());
        let request = RequestId::next();
        let part = Part { partition: Partition(0), owner, request, wants: Arc::new([]) };
        state.cover(request, now + lease);
        let holder = (Arc::clone(state), now + lease * 99);
        Arc::new(Kept::new((part, Lease::new(lease).unwrap(), true), holder, None))
    }

    #[tokio::test(start_paused = true)]
    async fn leases_that_ended_while_the_host_slept_are_lost_and_the_others_are_due() {
        let (schedule, now) = (Schedule::new(), Instant::now());
        let (short, long) = (Arc::<LeaseState>::default(), Arc::<LeaseState>::default());
        for (state, seconds) in [(&short, 3), (&long, 30)] {
            let kept = kept(state, now, Duration::from_secs(seconds));
            let due = now + Duration::from_secs(seconds / 3);
            schedule.put(kept.part.request, Job::Keep(kept), Some(due));
        }
        assert!(schedule.take_due(now).is_empty());
        schedule.slept(Duration::from_secs(5), now);
        assert!(short.lost().is_cancelled(), "told without being asked");
        assert!(long.is_held());
        assert_eq!(long.deadline(), Some(now + Duration::from_secs(25)));
        assert_eq!(schedule.take_due(now).len(), 2);
    }
}
