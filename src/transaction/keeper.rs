//! Keeps the sessions of idle branches alive for as long as their lease is.
//!
//! A store ends a session that is idle for longer than a lease, so that a process that was stopped
//! does not lock rows for ever. A holder that only thinks must not fall to that rule, so its
//! branches are pinged three times per lease while the lease is held.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use super::core::Core;

#[derive(Debug, Default)]
pub(super) struct Keeper {
    table: Mutex<Table>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Table {
    due: BTreeMap<(Instant, Uuid), Weak<Core>>,
    wakes_at: Option<Instant>,
    stopped: bool,
}

/// Takes an entry out of the table when its transaction ends.
#[derive(Debug)]
pub(super) struct Entry {
    keeper: Arc<Keeper>,
    attempt: Uuid,
    due: Mutex<Instant>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let due = *self.due.lock().unwrap_or_else(PoisonError::into_inner);
        self.keeper.lock().due.remove(&(due, self.attempt));
    }
}

impl Keeper {
    /// Pings the branches of `core` from now on, until the entry is dropped.
    pub(super) fn keep(self: &Arc<Self>, core: &Arc<Core>) -> Entry {
        let due = Instant::now() + core.lease.get() / 3;
        let mut table = self.lock();
        table.due.insert((due, core.attempt), Arc::downgrade(core));
        let sooner = table.wakes_at.is_none_or(|wakes_at| due < wakes_at);
        drop(table);
        if sooner {
            self.changed.notify_one();
        }
        Entry { keeper: Arc::clone(self), attempt: core.attempt, due: Mutex::new(due) }
    }

    /// Ends the task.
    pub(super) fn stop(&self) {
        self.lock().stopped = true;
        self.changed.notify_one();
    }

    /// Runs until stopped.
    pub(super) async fn run(self: Arc<Self>) {
        let mut pings = FuturesUnordered::new();
        loop {
            let next = {
                let mut table = self.lock();
                if table.stopped {
                    return;
                }
                let now = Instant::now();
                while let Some(entry) = table.due.first_entry()
                    && entry.key().0 <= now
                {
                    if let Some(core) = entry.remove().upgrade() {
                        pings.push(async move { core.ping().await.then_some(core) });
                    }
                }
                table.wakes_at = table.due.first_key_value().map(|((due, _), _)| *due);
                table.wakes_at
            };
            tokio::select! {
                () = self.changed.notified() => {}
                () = sleep_until(next) => {}
                Some(kept) = pings.next(), if !pings.is_empty() => self.again(kept),
            }
        }
    }

    fn again(&self, kept: Option<Arc<Core>>) {
        let Some(core) = kept else { return };
        let due = Instant::now() + core.lease.get() / 3;
        let entry = core.kept();
        if let Some(entry) = entry.as_ref() {
            self.lock().due.insert((due, core.attempt), Arc::downgrade(&core));
            *entry.due.lock().unwrap_or_else(PoisonError::into_inner) = due;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
