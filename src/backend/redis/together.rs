//! Operations that share one call of a script when many are under way.
//!
//! # Why only then
//! A call costs the server and the client more than the operation in it, so that sixty-four tasks
//! get up to twice as much done when their operations travel together. One that waits for company
//! waits, though: with sixteen tasks or fewer, sending each at once is faster by a third.
//!
//! # Why every operation can still go alone
//! A shared call has only the fast way, and is tried only once. Who meets somebody, and everybody
//! when the call fails, sends the operation again by itself: a copy is harmless.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use redis::Value;
use tokio::sync::{Notify, oneshot};

use super::request::{self, Share};
use super::script::Call;

/// So many operations under way go alone.
const ALONE: usize = 16;

/// The most shared calls under way at once.
const CALLS: usize = 8;

/// The most operations in one call. The server does nothing else meanwhile.
const SHARES: usize = 64;

/// The most keys in one call, unless a single operation has more.
const KEYS: usize = 512;

/// Those who wait for a place in a call.
#[derive(Default)]
pub(super) struct Together {
    under_way: AtomicUsize,
    queue: Mutex<Queue>,
    changed: Notify,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Passenger>,
    calls: usize,
}

/// One operation that travels with others.
struct Passenger {
    share: Share,
    answer: oneshot::Sender<Value>,
}

/// An operation under way, until it is dropped.
pub(super) struct UnderWay<'a>(&'a Together);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A call that is filled. Dropped, it makes place for the next one, and whoever was not answered
/// goes alone.
pub(super) struct Trip<'a> {
    together: &'a Together,
    answers: Vec<oneshot::Sender<Value>>,
}

impl Drop for Trip<'_> {
    fn drop(&mut self) {
        self.together.lock().calls -= 1;
    }
}

impl Trip<'_> {
    /// Tells everyone that nothing was done.
    pub(super) fn turn_back(mut self) {
        for passenger in self.answers.drain(..) {
            let _ = passenger.send(Value::Int(0));
        }
    }

    /// Tells everyone the answer. One that is not an array of the right length tells nobody.
    pub(super) fn arrive(mut self, answer: Value) {
        let Value::Array(values) = answer else { return };
        if values.len() != self.answers.len() {
            return;
        }
        for (passenger, value) in self.answers.drain(..).zip(values) {
            // Who has left meanwhile settles it.
            let _ = passenger.send(value);
        }
    }
}

impl Together {
    /// Counts an operation. Says whether there is a crowd.
    pub(super) fn enter(&self) -> (UnderWay<'_>, bool) {
        let before = self.under_way.fetch_add(1, Ordering::Relaxed);
        (UnderWay(self), before >= ALONE)
    }

    /// Waits for a place in the next call.
    pub(super) fn join(&self, share: Share) -> oneshot::Receiver<Value> {
        let (answer, answered) = oneshot::channel();
        let mut queue = self.lock();
        queue.waiting.push_back(Passenger { share, answer });
        let departs = queue.calls < CALLS;
        drop(queue);
        if departs {
            self.changed.notify_one();
        }
        answered
    }

    /// Resolves when somebody may be waiting for a call.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Fills the next call, if there is a place for it and somebody waits.
    pub(super) fn depart(&self) -> Option<(Call, Trip<'_>)> {
        let mut queue = self.lock();
        if queue.calls >= CALLS {
            return None;
        }
        let size = (self.under_way.load(Ordering::Relaxed) / CALLS).clamp(1, SHARES);
        let (mut passengers, mut keys) = (Vec::<Passenger>::new(), 0);
        while passengers.len() < size
            && let Some(next) = queue.waiting.pop_front()
        {
            // Who has left has sent a cancel, which must not be overtaken.
            if next.answer.is_closed() {
                continue;
            }
            keys += next.share.keys();
            if passengers.first().is_some_and(|first| {
                first.share.partition() != next.share.partition() || keys > KEYS
            }) {
                queue.waiting.push_front(next);
                break;
            }
            passengers.push(next);
        }
        if passengers.is_empty() {
            return None;
        }
        queue.calls += 1;
        drop(queue);
        passengers.sort_by_key(|passenger| passenger.share.acquires());
        let (shares, answers): (Vec<_>, _) =
            passengers.into_iter().map(|Passenger { share, answer }| (share, answer)).unzip();
        Some((request::together(&shares), Trip { together: self, answers }))
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
