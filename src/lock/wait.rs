//! A request that stands in line, as its own client sees it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::protocol::{Grant, Part};
use crate::types::Lease;

use super::lane::Lane;

/// Shared by the task that waits, the watchdog that refreshes, and the sink of pushes.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) part: Part,
    pub(super) lease: Lease,
    /// Who waits behind it in this process.
    pub(super) lane: Option<Arc<Lane>>,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    /// When the last call was *sent* that was answered `Queued`: a grant cannot be older.
    queued: Instant,
    /// Whether the last refresh was left unanswered.
    unanswered: bool,
    outcome: Option<Turn>,
}

/// How standing in line ended.
#[derive(Clone, Debug)]
pub(super) enum Turn {
    /// The grant, and until when it lasts at least. One that was pushed has yet to be confirmed.
    Granted { grant: Grant, deadline: Instant, confirmed: bool },
    /// The service does not know the request any more.
    Forgotten,
}

impl Waiting {
    pub(super) fn new(part: Part, lease: Lease, sent: Instant, lane: Option<Arc<Lane>>) -> Self {
        let state = Mutex::new(State { queued: sent, unanswered: false, outcome: None });
        Self { part, lease, lane, state, changed: Notify::new() }
    }

    /// A call sent at `sent` was answered `Queued`.
    pub(super) fn queued(&self, sent: Instant) {
        let mut state = self.lock();
        state.queued = state.queued.max(sent);
        state.unanswered = false;
        if let Some(lane) = &self.lane {
            lane.set_unanswered(false);
        }
    }

    /// The host was suspended for `by`: what was answered before is as much older, and a grant that
    /// nobody has taken yet lasts for as much less.
    pub(super) fn slept(&self, by: Duration) {
        let earlier = |at: Instant| at.checked_sub(by).unwrap_or(at);
        let mut state = self.lock();
        state.queued = earlier(state.queued);
        if let Some(Turn::Granted { deadline, .. }) = &mut state.outcome {
            *deadline = earlier(*deadline);
        }
    }

    /// A refresh failed.
    pub(super) fn unanswered(&self) {
        self.lock().unanswered = true;
        if let Some(lane) = &self.lane {
            lane.set_unanswered(true);
        }
    }

    /// Whether the service has stopped answering while the request stood in line.
    pub(super) fn is_unanswered(&self) -> bool {
        self.lock().unanswered
    }

    /// A grant was pushed. It lasts for the claim time, counted from when it can have been made at
    /// the earliest.
    pub(super) fn pushed(&self, grant: Grant) {
        let deadline = self.lock().queued + self.lease.sure_claim();
        self.end(Turn::Granted { grant, deadline, confirmed: false });
    }

    /// A refresh sent at `sent` was answered with the grant.
    pub(super) fn granted(&self, grant: Grant, sent: Instant) {
        let deadline = sent + self.lease.get() - self.lease.drift();
        self.end(Turn::Granted { grant, deadline, confirmed: true });
    }

    pub(super) fn forgotten(&self) {
        self.end(Turn::Forgotten);
    }

    /// Waits for the end. Dropping the future loses nothing.
    pub(super) async fn turn(&self) -> Turn {
        loop {
            if let Some(turn) = self.lock().outcome.clone() {
                return turn;
            }
            self.changed.notified().await;
        }
    }

    /// The first end stands, but a confirmation improves a pushed grant that nobody has taken yet.
    /// How many tokens were reserved is told by the push, and by the answer only if that call made
    /// the grant; either may come first.
    fn end(&self, mut turn: Turn) {
        let mut state = self.lock();
        if let (Turn::Granted { grant, .. }, Some(Turn::Granted { grant: known, .. })) =
            (&mut turn, &mut state.outcome)
            && grant.tokens == known.tokens
        {
            let block = grant.block.max(known.block);
            (grant.block, known.block) = (block, block);
        }
        let confirms = matches!(turn, Turn::Granted { confirmed: true, .. });
        if state.outcome.is_none() || confirms {
            state.outcome = Some(turn);
        }
        drop(state);
        self.changed.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::types::Want;
    use crate::types::{ClientId, FencingToken, Mode, OwnerId, Partition, RequestId, ResourceKey};

    fn grant(request: RequestId, block: u32) -> Grant {
        Grant { request, tokens: vec![FencingToken::FIRST], block }
    }

    fn part() -> Part {
        let wants = [Want::new(ResourceKey::parse("k").unwrap(), Mode::Exclusive)].into();
        let (owner, request) = (OwnerId::group(ClientId::random()), RequestId::next());
        Part { partition: Partition(0), owner, request, wants }
    }

    #[tokio::test]
    async fn what_a_host_slept_is_taken_off_a_grant_that_nobody_has_taken_yet() {
        let (part, now) = (part(), Instant::now());
        let lease = Lease::new(Duration::from_secs(10)).unwrap();
        for confirmed in [false, true] {
            let waiting = Waiting::new(part.clone(), lease, now, None);
            match confirmed {
                true => waiting.granted(grant(part.request, 1), now),
                false => waiting.pushed(grant(part.request, 1)),
            }
            let deadline = async || match waiting.turn().await {
                Turn::Granted { deadline, .. } => deadline,
                Turn::Forgotten => panic!("forgotten"),
            };
            let before = deadline().await;
            waiting.slept(Duration::from_secs(5));
            assert_eq!(before - deadline().await, Duration::from_secs(5));
        }
    }

    #[tokio::test]
    async fn push_and_refresh_come_in_any_order_and_the_block_is_known() {
        let part = part();
        let (request, lease) = (part.request, Lease::new(Duration::from_secs(10)).unwrap());
        for (pushed, refreshed, push_first) in
            [(256, 1, true), (256, 1, false), (1, 256, true), (1, 256, false), (256, 256, false)]
        {
            let waiting = Waiting::new(part.clone(), lease, Instant::now(), None);
            let push = || waiting.pushed(grant(request, pushed));
            let refresh = || waiting.granted(grant(request, refreshed), Instant::now());
            if push_first {
                push();
                refresh();
            } else {
                refresh();
                push();
            }
            let Turn::Granted { grant, confirmed, .. } = waiting.turn().await else {
                panic!("forgotten")
            };
            assert_eq!((grant.block, confirmed), (256, true), "{pushed} {refreshed} {push_first}");
        }
    }
}
