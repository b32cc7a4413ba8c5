//! One grant at the service, from the moment it was made until it is given up.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::error::{Error, ErrorKind, Result};
use crate::protocol::{Part, Released};
use crate::types::{FencingToken, Lease, LeaseState};

use super::schedule::{Job, Settle};
use super::service::Service;

/// What the watchdog knows of a grant.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) part: Part,
    pub(super) lease: Lease,
    pub(super) state: Arc<LeaseState>,
    /// Whether the watchdog renews; if not, it only tells when the lease has run out.
    pub(super) renews: bool,
    /// No renewal after this.
    pub(super) last: Instant,
    /// Cancelled when the service has confirmed the grant.
    pub(super) confirmed: CancellationToken,
}

/// A grant. Dropping it hands the release to the watchdog.
#[derive(Debug)]
pub(super) struct Hold {
    service: Arc<Service>,
    kept: Arc<Kept>,
    tokens: Vec<FencingToken>,
    since: Instant,
    ended: bool,
}

impl Hold {
    /// Takes over a grant: from here on it is renewed, and given up when this is dropped.
    pub(super) fn start(
        service: Arc<Service>,
        kept: Kept,
        tokens: Vec<FencingToken>,
        deadline: Instant,
    ) -> Self {
        let (part, since) = (&kept.part, Instant::now());
        let wants = part.wants.clone();
        let state = Arc::clone(&kept.state);
        service.owners.hold(part.owner, part.partition, part.request, wants, state);
        kept.state.cover(part.request, deadline);
        service.counters.granted();
        let kept = Arc::new(kept);
        let hold = Self { service, kept, tokens, since, ended: false };
        let due = hold.first_due(deadline);
        hold.service.schedule.put(
            hold.part().request,
            Job::Keep(Arc::clone(&hold.kept)),
            Some(due),
        );
        hold
    }

    /// A pushed grant is confirmed at once, beside the work. Else the interval counts from when the
    /// request was sent, as the deadline does: after a slow answer there is less time left.
    fn first_due(&self, deadline: Instant) -> Instant {
        let Kept { lease, renews, confirmed, .. } = &*self.kept;
        if !confirmed.is_cancelled() {
            return self.since;
        }
        if !renews {
            return deadline;
        }
        let interval = lease.get() / 3;
        let sent = deadline + lease.drift() - lease.get();
        self.service.schedule.aligned(sent + interval, interval).min(deadline)
    }

    pub(super) fn part(&self) -> &Part {
        &self.kept.part
    }

    pub(super) fn kept(&self) -> &Arc<Kept> {
        &self.kept
    }

    pub(super) fn tokens(&self) -> &[FencingToken] {
        &self.tokens
    }

    pub(super) fn since(&self) -> Instant {
        self.since
    }

    /// Waits until the service has confirmed a grant that was pushed.
    pub(super) async fn confirmed(&self) -> Result<()> {
        tokio::select! {
            () = self.kept.confirmed.cancelled() => Ok(()),
            () = self.kept.state.lost().cancelled() => Err(lost("confirm", self.part())),
        }
    }

    /// Gives the grant up and waits for the answer. Dropping the future hands the rest to the
    /// watchdog.
    pub(super) async fn release(mut self) -> Result<()> {
        let was_held = self.kept.state.is_held();
        let until = self.until();
        self.end();
        // Sent again by the watchdog if this future is dropped or the call fails.
        let unsent = Unsettled { service: &self.service, part: Some(self.part().clone()), until };
        let answer = self.service.call(None, self.service.backend.release(self.part())).await;
        match answer {
            Ok(Released::Released) => unsent.settled(),
            Ok(Released::Gone) => {
                unsent.settled();
                if was_held {
                    self.service.counters.lost();
                }
                return Err(lost("release", self.part()).with_no_retry());
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// When nothing is left of the grant even if nobody releases it.
    fn until(&self) -> Instant {
        Instant::now() + self.kept.lease.get()
    }

    /// Takes the grant out of the books. Only once. Until the release is settled it stays in the
    /// schedule, so that a shutdown waits for it.
    fn end(&mut self) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let Part { owner, request, .. } = *self.part();
        let settle = Settle { part: self.part().clone(), cancel: false, until: self.until() };
        self.service.schedule.put(request, Job::Settle(Arc::new(settle)), None);
        self.service.owners.release(owner, request);
        self.kept.state.uncover(request);
        self.service.counters.released(self.since.elapsed());
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if !self.ended {
            let until = self.until();
            self.end();
            self.service.settle(self.part().clone(), false, until);
        }
    }
}

/// Hands a release to the watchdog unless it was answered.
struct Unsettled<'a> {
    service: &'a Service,
    part: Option<Part>,
    until: Instant,
}

impl Unsettled<'_> {
    fn settled(mut self) {
        if let Some(part) = self.part.take() {
            self.service.schedule.remove(part.request);
        }
    }
}

impl Drop for Unsettled<'_> {
    fn drop(&mut self) {
        if let Some(part) = self.part.take() {
            self.service.settle(part, false, self.until);
        }
    }
}

/// The error of whoever works on after its lease.
pub(super) fn lost(operation: &'static str, part: &Part) -> Error {
    let detail = "the lease was lost: it ran out, or the lock service lost its memory; \
                  what was done since may run beside another holder";
    let error = Error::new(ErrorKind::LeaseLost, operation, detail);
    match part.wants.first() {
        Some(want) => error.with_key(want.key.clone()),
        None => error,
    }
}

impl Service {
    /// Leaves a release or a cancel to the watchdog.
    pub(super) fn settle(&self, part: Part, cancel: bool, until: Instant) {
        let request = part.request;
        let job = Job::Settle(Arc::new(Settle { part, cancel, until }));
        self.schedule.put(request, job, Some(Instant::now()));
    }

    /// Bounds one call to the service.
    pub(super) async fn call<T>(
        &self,
        limit: Option<Duration>,
        call: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let limit = limit.unwrap_or(self.options.call_timeout).min(self.options.call_timeout);
        match tokio::time::timeout(limit, call).await {
            Ok(answer) => answer,
            Err(_) => {
                let detail = format!("the lock service did not answer within {limit:?}");
                Err(Error::new(ErrorKind::Unavailable, "call", detail))
            }
        }
    }
}
