//! One grant at the service, from the moment it was made until it is given up.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::SetOnce;
use tokio::time::Instant;

use crate::error::{Error, ErrorKind, Result};
use crate::protocol::{Part, Released, Renewals};
use crate::types::{FencingToken, Lease, LeaseState, OwnerId};

use super::crowd::Seat;
use super::lane::{Lane, Turn, Waiter};
use super::owners::{Alias, Entry};
use super::schedule::{Job, Settle};
use super::service::Service;

/// Longer leases have no longer claims.
const CLAIMED: Duration = Duration::from_secs(30);

/// How long a grant that was pushed waits for its confirmation while nobody asks for it. Work on a
/// key that many want is mostly over sooner, and what was given up needs no confirmation.
const UNASKED: Duration = Duration::from_millis(10);

/// What the watchdog knows of a grant. It stays when the grant is passed on within the process.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) part: Part,
    pub(super) lease: Lease,
    /// Whether the watchdog renews; if not, it only tells when the lease has run out.
    pub(super) renews: bool,
    /// Who may hold it next.
    pub(super) lane: Option<Arc<Lane>>,
    /// Set when the service has confirmed the grant.
    confirmed: SetOnce<()>,
    holder: Mutex<Holder>,
}

/// Who works under a grant now.
#[derive(Debug)]
struct Holder {
    state: Arc<LeaseState>,
    /// No renewal after this.
    last: Instant,
}

impl Kept {
    pub(super) fn new(
        (part, lease, renews): (Part, Lease, bool),
        (state, last): (Arc<LeaseState>, Instant),
        lane: Option<Arc<Lane>>,
    ) -> Self {
        let (confirmed, holder) = (SetOnce::new(), Mutex::new(Holder { state, last }));
        Self { part, lease, renews, lane, confirmed, holder }
    }

    /// Whether the service has confirmed the grant. One that was pushed has yet to be.
    pub(super) fn is_confirmed(&self) -> bool {
        self.confirmed.initialized()
    }

    pub(super) fn confirm(&self) {
        // Only the first time counts.
        let _ = self.confirmed.set(());
    }

    pub(super) fn is_held(&self) -> bool {
        self.lock().state.is_held()
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.lock().state.deadline()
    }

    /// No renewal after this.
    pub(super) fn last(&self) -> Instant {
        self.lock().last
    }

    /// The service has confirmed the grant, in a call that was sent at `sent`. Returns whether it
    /// is held: the answer may come after its end, and what is lost stays lost.
    #[must_use]
    pub(super) fn renewed(&self, sent: Instant) -> bool {
        let deadline = sent + self.lease.get() - self.lease.drift();
        // Under one lock: whoever it was passed on from meanwhile says nothing about it.
        let holder = self.lock();
        holder.state.extend(self.part.request, deadline);
        let held = holder.state.is_held();
        drop(holder);
        if held {
            self.confirm();
        }
        if let Some(lane) = &self.lane {
            lane.set_unanswered(false);
        }
        held
    }

    /// When the watchdog looks at it next if it does not renew: at its end, but before that as
    /// often as if it did, because no timer runs while the host is suspended.
    pub(super) fn next_look(&self, deadline: Instant) -> Instant {
        deadline.min(Instant::now() + Renewals::new(self.lease).after_success())
    }

    /// The host was suspended for `by` while the lease ran on. A lease that has ended meanwhile is
    /// lost at once.
    pub(super) fn slept(&self, by: Duration) {
        let holder = self.lock();
        holder.state.shorten(self.part.request, by);
        // Marks it as lost if it is.
        let _ = holder.state.is_held();
    }

    /// The grant is lost: whoever holds it learns of it, and nobody gets it any more.
    pub(super) fn lose(&self) {
        // Under the lock, so that it is not passed on meanwhile.
        self.lock().state.lose();
        if let Some(lane) = &self.lane {
            lane.end();
        }
    }

    /// Makes `state` the one that is lost with the grant, if there is a grant to pass on: held, and
    /// with time to spare. A third of the lease, because with less its renewal is overdue; where it
    /// was pushed and is being confirmed, a part of the claim.
    ///
    /// Until it is taken it is renewed for no longer than a lease: the next holder may never look.
    fn pass(&self, state: &Arc<LeaseState>) -> bool {
        let mut holder = self.lock();
        let now = Instant::now();
        let lease = self.lease.get();
        let spare = match self.is_confirmed() {
            true => lease / 3 + self.lease.drift(),
            false => lease.min(CLAIMED) / 10,
        };
        let least = now + spare;
        let deadline = holder.state.deadline_of(self.part.request);
        let Some(deadline) = deadline.filter(|deadline| *deadline > least) else { return false };
        if now >= holder.last || !holder.state.is_held() {
            return false;
        }
        state.cover(self.part.request, deadline);
        *holder = Holder { state: Arc::clone(state), last: now + lease };
        true
    }

    /// Whoever it was passed on to has it in hand. Returns whether that is so late that renewing
    /// it has ceased.
    fn taken(&self, max_hold: Duration) -> bool {
        let now = Instant::now();
        let last = std::mem::replace(&mut self.lock().last, now + max_hold);
        last <= now
    }

    fn lock(&self) -> MutexGuard<'_, Holder> {
        self.holder.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who takes a grant over, as its own client knows it.
pub(super) struct Taker {
    pub(super) owner: OwnerId,
    pub(super) state: Arc<LeaseState>,
    /// Under which name the service knows the owner, if not its own.
    pub(super) alias: Option<Alias>,
    pub(super) seat: Option<Seat>,
}

/// A grant in somebody's hands. Dropping it passes it on, or hands the release to the watchdog.
#[derive(Debug)]
pub(super) struct Hold {
    service: Arc<Service>,
    kept: Arc<Kept>,
    owner: OwnerId,
    state: Arc<LeaseState>,
    tokens: Vec<FencingToken>,
    since: Instant,
    ended: bool,
    _seat: Option<Seat>,
}

impl Hold {
    /// Takes over a grant: from here on it is renewed, and given up when this is dropped.
    pub(super) fn start(
        service: Arc<Service>,
        kept: Kept,
        tokens: Vec<FencingToken>,
        deadline: Instant,
        taker: Taker,
    ) -> Self {
        taker.state.cover(kept.part.request, deadline);
        let hold = Self::take(service, Arc::new(kept), tokens, taker);
        let due = hold.first_due(deadline);
        hold.service.schedule.put(
            hold.part().request,
            Job::Keep(Arc::clone(&hold.kept)),
            Some(due),
        );
        hold
    }

    /// Books a grant for somebody.
    fn take(
        service: Arc<Service>,
        kept: Arc<Kept>,
        tokens: Vec<FencingToken>,
        taker: Taker,
    ) -> Self {
        let Taker { owner, state, alias, seat } = taker;
        let Part { partition, request, wants, .. } = &kept.part;
        let entry = Entry {
            partition: *partition,
            request: *request,
            wants: Arc::clone(wants),
            state: Arc::clone(&state),
            alias,
            lane: kept.lane.clone(),
        };
        service.owners.hold(owner, entry);
        service.counters.granted();
        let since = Instant::now();
        Self { service, kept, owner, state, tokens, since, ended: false, _seat: seat }
    }

    /// A pushed grant is confirmed beside the work, while most of its claim is left. Else the
    /// interval counts from when the request was sent, as the deadline does: after a slow answer
    /// there is less time left.
    fn first_due(&self, deadline: Instant) -> Instant {
        let Kept { lease, renews, .. } = &*self.kept;
        if !self.kept.is_confirmed() {
            let claimed = deadline.saturating_duration_since(self.since);
            return self.since + UNASKED.min(claimed / 10);
        }
        if !renews {
            return self.kept.next_look(deadline);
        }
        let interval = lease.get() / 3;
        let sent = deadline + lease.drift() - lease.get();
        self.service.schedule.aligned(sent + interval, interval).min(deadline)
    }

    /// What was passed on has arrived.
    pub(super) fn taken(self, max_hold: Duration) -> Self {
        if self.kept.taken(max_hold) {
            self.sooner();
        }
        self
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

    /// Has a grant that was pushed confirmed now, because somebody will wait for it.
    pub(super) fn confirm_now(&self) {
        if !self.kept.is_confirmed() {
            self.sooner();
        }
    }

    /// Has the watchdog look at the grant now.
    fn sooner(&self) {
        let (request, job) = (self.part().request, Job::Keep(Arc::clone(&self.kept)));
        self.service.schedule.sooner(request, &job, Instant::now());
    }

    /// Waits until the service has confirmed a grant that was pushed.
    pub(super) async fn confirmed(&self) -> Result<()> {
        self.confirm_now();
        tokio::select! {
            () = self.kept.confirmed.wait() => {}
            () = self.state.lost().cancelled() => {}
        }
        // Both may be true, and no timer may have noticed yet that a deadline has passed.
        if self.state.is_held() { Ok(()) } else { Err(lost("confirm", self.part())) }
    }

    /// Gives the grant to the next in its lane; `false` when it is to be released.
    fn pass_on(&mut self) -> bool {
        let Some(lane) = self.kept.lane.clone() else { return false };
        if self.service.closing.is_cancelled() {
            lane.end();
            return false;
        }
        // A lease that ended while the host was suspended is lost when this returns.
        self.service.wakefulness.slept();
        let Some((next, first, token)) = lane.next(|state| self.kept.pass(state)) else {
            return false;
        };
        self.strike_out();
        let Waiter { owner, state, .. } = &next;
        let alias = Some(Alias { owner: lane.owner(), token: first, instead: token });
        let taker = Taker { owner: *owner, state: Arc::clone(state), alias, seat: None };
        let tokens = vec![token; self.tokens.len()];
        let (service, kept) = (Arc::clone(&self.service), Arc::clone(&self.kept));
        next.tell(Turn::Held(Self::take(service, kept, tokens, taker)));
        true
    }

    /// Gives the grant up and waits for the answer, if it is not passed on. Dropping the future
    /// hands the rest to the watchdog.
    pub(super) async fn release(mut self) -> Result<()> {
        if self.pass_on() {
            return Ok(());
        }
        let was_held = self.state.is_held();
        let until = self.until();
        self.end();
        // Sent again by the watchdog if this future is dropped or the call fails.
        let unsent = Unsettled { service: &self.service, part: Some(self.part().clone()), until };
        let Service { backend, vitals, options, .. } = &*self.service;
        let pass = vitals.pass().of_release();
        match pass.call(options.call_timeout, backend.release(self.part())).await {
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
        if self.ended {
            return;
        }
        let settle = Settle { part: self.part().clone(), cancel: false, until: self.until() };
        self.service.schedule.put(self.part().request, Job::Settle(Arc::new(settle)), None);
        self.strike_out();
    }

    /// Whoever had the grant has it no more.
    fn strike_out(&mut self) {
        self.ended = true;
        let request = self.part().request;
        self.service.owners.release(self.owner, request);
        self.state.uncover(request);
        self.service.counters.released(self.since.elapsed());
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if !self.ended && !self.pass_on() {
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

    /// Makes one call to the service that is never refused.
    pub(super) async fn call<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        self.vitals.pass().call(self.options.call_timeout, call).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{ClientId, Partition, RequestId};

    /// A grant that lasts for `lease`, and who holds it.
    fn kept(lease: Duration) -> (Kept, Arc<LeaseState>) {
        let (owner, request) = (OwnerId::new(ClientId::random()), RequestId::next());
        let part = Part { partition: Partition(0), owner, request, wants: Arc::new([]) };
        let (state, now) = (Arc::<LeaseState>::default(), Instant::now());
        state.cover(request, now + lease);
        let holder = (Arc::clone(&state), now + lease * 9);
        (Kept::new((part, Lease::new(lease).unwrap(), true), holder, None), state)
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_renewed_is_looked_at_thrice_in_a_lease() {
        let (lease, begun) = (Duration::from_secs(3), Instant::now());
        let (kept, _state) = kept(lease);
        let mut looks = Vec::new();
        while begun.elapsed() < lease {
            let next = kept.next_look(begun + lease);
            tokio::time::sleep_until(next).await;
            looks.push(begun.elapsed().as_secs());
        }
        assert_eq!(looks, [1, 2, 3]);
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_after_the_end_of_the_lease_confirms_nothing() {
        let lease = Duration::from_secs(3);
        for (late, held) in [(lease / 2, true), (lease * 2, false)] {
            let (kept, state) = kept(lease);
            tokio::time::advance(late).await;
            assert_eq!(kept.renewed(Instant::now()), held);
            assert_eq!((kept.is_confirmed(), state.is_held()), (held, held));
        }
    }
}
