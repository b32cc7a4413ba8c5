//! The end of a transaction: decided once, carried out by a task that nobody can cancel.

use std::sync::Arc;

use tracing::Instrument;

use crate::error::{Error, ErrorKind, Result};
use crate::lock::LockGuard;
use crate::store::Outcome;

use super::core::{Core, Slot};
use super::fallback::Ground;
use super::observe;

/// How a transaction is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Commit,
    Rollback,
}

impl Core {
    /// Ends the transaction. The work is done by a task of its own, so that dropping the future
    /// drops the wait and not the commit.
    pub(super) async fn finish(self: &Arc<Self>, end: End) -> Result<()> {
        let Some((slots, guards)) = self.close() else {
            let detail = "the transaction has ended already";
            return Err(Error::new(ErrorKind::Misuse, "commit", detail));
        };
        let task = self.spawn(end, slots, guards);
        match task.await {
            Ok(answer) => answer,
            Err(_) => {
                let detail = "the task that ended the transaction was killed";
                let error = Error::new(ErrorKind::InDoubt, "commit", detail);
                Err(error.with_transaction(self.attempt))
            }
        }
    }

    /// Rolls back in the background what was neither committed nor rolled back.
    pub(super) fn abandon(self: &Arc<Self>) {
        if let Some((slots, guards)) = self.close() {
            drop(self.spawn(End::Rollback, slots, guards));
        }
    }

    fn spawn(
        self: &Arc<Self>,
        end: End,
        slots: Vec<Slot>,
        guards: Vec<LockGuard>,
    ) -> tokio::task::JoinHandle<Result<()>> {
        let core = Arc::clone(self);
        let name = match end {
            End::Commit => tracing::debug_span!("palisade.commit", attempt = %self.attempt),
            End::Rollback => tracing::debug_span!("palisade.rollback", attempt = %self.attempt),
        };
        let task = async move { core.carry_out(end, slots, guards).await }.instrument(name);
        self.shared.tasks.spawn_on(task, &self.shared.runtime)
    }

    /// Takes branches and locks out of the books; from here on nothing is added. Only once.
    fn close(&self) -> Option<(Vec<Slot>, Vec<LockGuard>)> {
        let mut books = self.books();
        if std::mem::replace(&mut books.ended, true) {
            return None;
        }
        let (slots, guards) = (std::mem::take(&mut books.slots), std::mem::take(&mut books.guards));
        let forgotten = books.depth > 0;
        drop(books);
        self.kept().take();
        for slot in &slots {
            if forgotten {
                // A nested transaction was leaked: neither committed nor rolled back, so undone.
                slot.branch.abandon_savepoint(1);
            }
            slot.branch.close();
        }
        Some((slots, guards))
    }

    async fn carry_out(
        self: Arc<Self>,
        end: End,
        slots: Vec<Slot>,
        guards: Vec<LockGuard>,
    ) -> Result<()> {
        let answer = match end {
            End::Commit => self.commit(&slots, &guards).await,
            End::Rollback => self.roll_back(&slots).await,
        };
        drop(slots);
        for guard in guards {
            // A release that fails is repeated by the watchdog; it cannot change the outcome any
            // more.
            if let Err(error) = guard.release().await {
                tracing::debug!(%error, "release after the end of a transaction");
            }
        }
        // Where there was no guard to give up, whoever still looks must not take the keys for held.
        self.state.lose();
        self.report(end, &answer);
        answer
    }

    async fn commit(&self, slots: &[Slot], guards: &[LockGuard]) -> Result<()> {
        if self.ground == Ground::Nothing {
            return Ok(());
        }
        if let Err(error) = self.confirm(guards).await {
            // Not even the rollback may hide a COMMIT that was sent through the branch.
            let undone = self.roll_back(slots).await;
            return Err(undone.err().filter(Error::is_in_doubt).unwrap_or(error));
        }
        let mut answer = Ok(());
        for slot in slots {
            if slot.branch.is_read_only() {
                self.undo(std::slice::from_ref(slot)).await;
                continue;
            }
            let failure = slot.branch.failure();
            answer = match slot.branch.commit().await {
                Outcome::Committed => Ok(()),
                Outcome::RolledBack(cause) => {
                    let cause = self.note(cause);
                    // The work went on after a statement had failed; that one says what may help.
                    failure.map(|failure| self.note(failure));
                    Err(cause)
                }
                Outcome::InDoubt(cause) => Err(cause),
            };
        }
        answer
    }

    /// The locks must be held, and grants that were only pushed must have been confirmed.
    async fn confirm(&self, guards: &[LockGuard]) -> Result<()> {
        for guard in guards {
            if guard.confirmed().await.is_err() {
                return Err(self.note(self.lost("commit")));
            }
        }
        if self.state.is_held() { Ok(()) } else { Err(self.note(self.lost("commit"))) }
    }

    async fn roll_back(&self, slots: &[Slot]) -> Result<()> {
        let mut answer = Ok(());
        for slot in slots {
            // Nobody holds up the release of the locks: what is not answered in time is closed.
            let rollback = tokio::time::timeout(self.lease.get(), slot.branch.rollback()).await;
            answer = answer.and(rollback.unwrap_or_else(|_| Err(unanswered())));
        }
        answer
    }

    /// Rolls back where nobody waits for the answer: the outcome is decided, and a connection that
    /// does not acknowledge is closed.
    async fn undo(&self, slots: &[Slot]) {
        if let Err(error) = self.roll_back(slots).await {
            tracing::debug!(%error, "rollback was not acknowledged");
        }
    }

    fn report(&self, end: End, answer: &Result<()>) {
        let attempt = self.attempt;
        match (end, answer) {
            (_, _) if self.ground == Ground::Nothing => observe::ended(observe::End::Degraded),
            (End::Commit, Ok(())) => {
                tracing::debug!(%attempt, "committed");
                observe::ended(observe::End::Committed);
            }
            (End::Commit, Err(error)) if error.is_in_doubt() => {
                tracing::error!(%attempt, %error, "in doubt");
                observe::ended(observe::End::InDoubt);
            }
            (_, answer) => {
                tracing::debug!(%attempt, ?answer, "rolled back");
                observe::ended(observe::End::RolledBack);
            }
        }
    }
}

fn unanswered() -> Error {
    let detail = "the store did not answer the rollback; its connection was closed";
    Error::new(ErrorKind::Unavailable, "rollback", detail)
}
