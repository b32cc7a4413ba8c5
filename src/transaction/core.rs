//! A transaction that has begun: its locks, its branches, and what may still be done with it.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tracing::Instrument;
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result, RetryAdvice};
use crate::lock::{LockGuard, Locks};
use crate::protocol::Backoff;
use crate::store::{AnyBranch, Fence, Held, Issuer, Store};
use crate::types::{FencingToken, Lease, LeaseState, Mode, OwnerId, Want};

use super::Shared;
use super::fallback::Ground;
use super::finish::End;
use super::keeper::Entry;

/// A branch needs a connection, however little a transaction wants to wait for others.
const LEAST_FENCE: Duration = Duration::from_secs(1);

/// What all handles of one transaction attempt share.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) shared: Arc<Shared>,
    pub(super) attempt: Uuid,
    pub(super) owner: OwnerId,
    pub(super) lease: Lease,
    pub(super) wait: Duration,
    pub(super) state: Arc<LeaseState>,
    pub(super) ground: Ground,
    /// The lock service on which the transaction stays, whichever it began on.
    pub(super) locks: Locks,
    books: Mutex<Books>,
    /// One branch is opened, and one savepoint set, at a time.
    opening: tokio::sync::Mutex<()>,
    kept: Mutex<Option<Entry>>,
    pub(super) retry: Backoff,
    pub(super) floor: Option<FencingToken>,
    /// What the last failure advises that no later success has outdated.
    advice: Mutex<Option<RetryAdvice>>,
}

/// How locks are asked for, for the whole of an attempt.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    pub(super) lease: Lease,
    pub(super) wait: Duration,
    pub(super) retry: Backoff,
    pub(super) floor: Option<FencingToken>,
}

/// What a transaction begins with.
#[derive(Debug)]
pub(super) struct Grant {
    pub(super) ground: Ground,
    pub(super) locks: Locks,
    pub(super) owner: OwnerId,
    pub(super) state: Arc<LeaseState>,
    pub(super) guard: Option<LockGuard>,
}

#[derive(Debug, Default)]
pub(super) struct Books {
    pub(super) guards: Vec<LockGuard>,
    /// Sorted by key, each once, in its strongest mode.
    pub(super) held: Vec<Held>,
    /// Keys that were added and are not fenced in every open branch yet.
    pub(super) unfenced: Vec<Held>,
    pub(super) slots: Vec<Slot>,
    pub(super) depth: u32,
    pub(super) ended: bool,
}

/// A branch in a store.
#[derive(Clone, Debug)]
pub(super) struct Slot {
    pub(super) store: Arc<dyn Store>,
    pub(super) branch: Arc<dyn AnyBranch>,
}

impl Books {
    /// Whether this is news: a key that was not held, or only in a weaker mode.
    fn add(&mut self, new: Held) -> bool {
        match self.held.iter_mut().find(|held| held.key == new.key) {
            Some(held) if held.mode >= new.mode => return false,
            Some(held) => *held = new,
            None => self.held.push(new),
        }
        true
    }
}

impl Core {
    pub(super) fn new(shared: Arc<Shared>, terms: Terms, grant: Grant) -> Result<Arc<Self>> {
        let Terms { lease, wait, retry, floor } = terms;
        let Grant { ground, locks, owner, state, guard } = grant;
        let core = Self {
            shared,
            attempt: Uuid::now_v7(),
            owner,
            lease,
            wait,
            state,
            ground,
            locks,
            books: Mutex::default(),
            opening: tokio::sync::Mutex::new(()),
            kept: Mutex::default(),
            retry,
            floor,
            advice: Mutex::default(),
        };
        if let Some(guard) = guard {
            core.take(guard)?;
        }
        core.books().unfenced.clear();
        Ok(Arc::new(core))
    }

    pub(super) fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn kept(&self) -> MutexGuard<'_, Option<Entry>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps the locks of `guard` until the end, and notes what is to be fenced in open branches.
    pub(super) fn take(&self, guard: LockGuard) -> Result<()> {
        guard.confirm_now(); // beside the work; the commit waits for it
        let mut books = self.books();
        if books.ended {
            drop(books);
            // Granted too late: dropping the guard gives the locks up again.
            return self.check("nested");
        }
        for locked in guard.keys() {
            let new = Held { key: locked.key.clone(), mode: locked.mode, token: locked.token };
            if books.add(new.clone()) {
                books.unfenced.push(new);
            }
        }
        books.held.sort_by(|a, b| a.key.cmp(&b.key));
        books.guards.push(guard);
        Ok(())
    }

    /// Names the keys whose rows are the locks. Their tokens are what the first store must exceed.
    pub(super) fn want(&self, wants: Vec<Want>) {
        let floor = self.floor.max(self.shared.switch.floor(self.ground));
        let token = floor.unwrap_or(FencingToken::FIRST);
        let held = |want: Want| Held { key: want.key, mode: want.mode, token };
        self.books().held = wants.into_iter().map(held).collect();
    }

    /// The store has issued `token` for these keys, or for all.
    pub(super) fn issued(&self, keys: Option<Vec<Held>>, token: FencingToken) {
        let mut books = self.books();
        match keys {
            None => books.held.iter_mut().for_each(|held| held.token = token),
            Some(keys) => {
                for held in keys {
                    books.add(Held { token, ..held });
                }
                books.held.sort_by(|a, b| a.key.cmp(&b.key));
            }
        }
        drop(books);
        self.shared.switch.granted(self.ground, token);
    }

    /// Whether a key is held already, at least in this mode.
    pub(super) fn holds(&self, key: &str, mode: Mode) -> bool {
        self.books().held.iter().any(|held| held.key.as_str() == key && held.mode >= mode)
    }

    /// Undoes nested transactions that were leaked, neither ended nor dropped, above `depth`.
    pub(super) fn settle_depth(&self, depth: u32) {
        let mut books = self.books();
        if books.depth > depth {
            for slot in &books.slots {
                slot.branch.abandon_savepoint(depth + 1);
            }
            books.depth = depth;
        }
    }

    pub(super) fn fence(&self) -> Fence {
        Fence {
            attempt: self.attempt,
            owner: self.owner,
            held: self.books().held.clone(),
            issuer: match self.ground {
                Ground::Rows => Issuer::Store,
                _ => Issuer::LockService,
            },
            lease: self.lease,
            state: Arc::clone(&self.state),
            deadline: Instant::now() + self.wait.max(LEAST_FENCE),
        }
    }

    /// Refuses what comes too late or without locks.
    pub(super) fn check(&self, operation: &'static str) -> Result<()> {
        if self.books().ended {
            let detail = "the transaction has ended";
            return Err(Error::new(ErrorKind::Misuse, operation, detail));
        }
        if self.ground == Ground::Nothing {
            let detail = "the transaction began without the lock service: it has no token to show";
            return Err(Error::new(ErrorKind::Degraded, operation, detail));
        }
        if !self.state.is_held() {
            return Err(self.note(self.lost(operation)));
        }
        Ok(())
    }

    pub(super) fn lost(&self, operation: &'static str) -> Error {
        let detail = "the lease was lost; nothing of this transaction will be committed";
        Error::new(ErrorKind::LeaseLost, operation, detail).with_transaction(self.attempt)
    }

    /// Remembers what a failure advises, and draws the consequence of a stale token.
    pub(super) fn note(&self, error: Error) -> Error {
        *self.noted() = Some(error.retry_advice());
        if error.kind() == ErrorKind::StaleToken {
            self.locks.fence_out(self.owner);
        }
        error
    }

    /// A later success outdates what an earlier failure advised: the work has dealt with it.
    pub(super) fn forget_advice(&self) {
        *self.noted() = None;
    }

    fn noted(&self) -> MutexGuard<'_, Option<RetryAdvice>> {
        self.advice.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the failure of the work advises: that of a branch or a statement, or of the lease.
    pub(super) fn advice(&self) -> RetryAdvice {
        let noted = self.noted().clone().filter(|advice| *advice != RetryAdvice::Never);
        if let Some(advice) = noted {
            return advice;
        }
        // What has ended has given its locks up itself; a loss before that was noted.
        if !self.books().ended && !self.state.is_held() {
            return RetryAdvice::Again;
        }
        let failure = self.failure();
        failure.map_or(RetryAdvice::Never, |failure| failure.retry_advice())
    }

    /// The failure of a statement that lets a branch only roll back.
    pub(super) fn failure(&self) -> Option<Error> {
        let slots = self.books().slots.clone();
        slots.iter().find_map(|slot| slot.branch.failure())
    }

    /// The branch in `store`, opened behind its fence if need be.
    pub(super) async fn open(
        self: &Arc<Self>,
        store: &str,
        read_only: bool,
    ) -> Result<Arc<dyn AnyBranch>> {
        let operation = if read_only { "read" } else { "enlist" };
        self.check(operation)?;
        let _one_at_a_time = self.opening.lock().await;
        if let Some(branch) = self.opened(store, read_only, operation)? {
            return Ok(branch);
        }
        let store = self.store(store, operation)?;
        let span = tracing::debug_span!("palisade.branch", store = store.name(), read_only);
        let fence = self.fence();
        // Where the rows are the locks, one that might write later has to have them from the start.
        let read_only = read_only && (self.ground != Ground::Rows || !fence.writes());
        let branch = if read_only {
            store.open_read(&fence).instrument(span).await
        } else {
            store.open(&fence).instrument(span).await
        };
        let branch = branch.map_err(|error| self.note(error))?;
        if let Some(token) = branch.issued() {
            self.issued(None, token);
        }
        let depth = self.books().depth;
        for depth in 1..=depth {
            branch.savepoint(depth).await.map_err(|error| self.note(error))?;
        }
        self.add(Slot { store, branch: Arc::clone(&branch) }, operation)?;
        self.forget_advice();
        Ok(branch)
    }

    /// A branch that is there already; a write branch serves for reading too.
    fn opened(
        &self,
        store: &str,
        read_only: bool,
        operation: &'static str,
    ) -> Result<Option<Arc<dyn AnyBranch>>> {
        let books = self.books();
        if let Some(other) = books.slots.iter().find(|slot| slot.store.name() != store) {
            let detail = format!(
                "store {store:?} would be the second beside {:?}; a transaction has one store",
                other.store.name()
            );
            return Err(Error::new(ErrorKind::Misuse, operation, detail));
        }
        let write = books.slots.iter().find(|slot| !slot.branch.is_read_only());
        let read = books.slots.iter().find(|slot| slot.branch.is_read_only() && read_only);
        Ok(write.or(read).map(|slot| Arc::clone(&slot.branch)))
    }

    fn store(&self, name: &str, operation: &'static str) -> Result<Arc<dyn Store>> {
        self.shared.stores.get(name).cloned().ok_or_else(|| {
            let detail = format!("store {name:?} is unknown: add it to the coordinator's builder");
            Error::new(ErrorKind::Misuse, operation, detail)
        })
    }

    fn add(self: &Arc<Self>, slot: Slot, operation: &'static str) -> Result<()> {
        let mut books = self.books();
        if books.ended {
            // The transaction was finished while its branch was being opened; dropping the branch
            // closes its connection.
            drop(books);
            return self.check(operation);
        }
        books.slots.push(slot);
        drop(books);
        self.kept().get_or_insert_with(|| self.shared.keeper.keep(self));
        Ok(())
    }

    /// Pings all branches; `false` when there is nothing to ping any more.
    pub(super) async fn ping(&self) -> bool {
        let slots = {
            let books = self.books();
            if books.ended { Vec::new() } else { books.slots.clone() }
        };
        if slots.is_empty() || !self.state.is_held() {
            return false;
        }
        for slot in slots {
            let ping = tokio::time::timeout(self.lease.get() / 3, slot.branch.ping()).await;
            if !matches!(ping, Ok(Ok(()))) {
                tracing::debug!(store = slot.store.name(), ?ping, "ping failed");
            }
        }
        true
    }

    pub(super) async fn one_at_a_time(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.opening.lock().await
    }
}

/// A transaction, as its work sees it: what it holds, and its branches. It neither commits nor
/// rolls back; [`Transaction`] or [`run`](super::Coordinator::run) do.
#[derive(Debug)]
pub struct Tx {
    pub(super) core: Arc<Core>,
    /// How many nested transactions this handle is in.
    pub(super) depth: u32,
}

impl Tx {
    /// Names this attempt: on every row it fences, in spans, and in errors in doubt.
    #[must_use]
    pub fn id(&self) -> Uuid {
        self.core.attempt
    }

    /// Who holds the locks. Others in this process may re-enter as this owner. To lend it to
    /// another process, make it with [`Locks::owner`](crate::Locks::owner) and name it in
    /// [`TransactionRequest::owner`](crate::TransactionRequest::owner): the service may not know an
    /// owner that was not named.
    #[must_use]
    pub fn owner(&self) -> OwnerId {
        self.core.owner
    }

    /// The keys that are held, with modes and tokens, sorted by key. None where a handler has taken
    /// the work on itself.
    #[must_use]
    pub fn held(&self) -> Vec<Held> {
        self.core.books().held.clone()
    }

    /// Whether the transaction began without the lock service, by leave of its fallback.
    #[must_use]
    pub fn is_degraded(&self) -> bool {
        self.core.ground != Ground::Locks
    }

    /// Whether the locks are still held, as far as this process can know.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.core.ground != Ground::Nothing && self.core.state.is_held()
    }

    /// Resolves when a third of the lease is left and it has not been renewed: see
    /// [`Locked::expiring`](crate::Locked::expiring).
    ///
    /// # Cancel safety
    /// Dropping the future has no effect.
    pub async fn expiring(&self) {
        self.core.state.expiring().await;
    }

    /// Resolves when the lease is lost. There is none where fence rows are the locks.
    ///
    /// # Cancel safety
    /// Dropping the future has no effect.
    pub async fn lost(&self) {
        self.core.state.lost().cancelled().await;
    }
}

#[cfg(any(feature = "sqlite", feature = "postgres"))]
mod sql {
    use super::{Error, ErrorKind, Result, Tx};
    use crate::store::{Branch, SqlDatabase, SqlStore};

    impl Tx {
        /// The branch of this transaction in `store`, opened behind its fence when asked for first.
        ///
        /// The branch borrows the transaction, so that it cannot outlive commit or rollback.
        ///
        /// # Errors
        /// - [`StaleToken`](ErrorKind::StaleToken): the store has seen a newer holder of a key.
        /// - [`Misuse`](ErrorKind::Misuse): the store is unknown to the coordinator, a second
        ///   store, or no key is held exclusively.
        /// - [`Conflict`](ErrorKind::Conflict): another branch had the rows until the wait was
        ///   over.
        /// - [`LeaseLost`](ErrorKind::LeaseLost), [`Degraded`](ErrorKind::Degraded),
        ///   [`NotMigrated`](ErrorKind::NotMigrated), [`Unavailable`](ErrorKind::Unavailable),
        ///   [`Store`](ErrorKind::Store).
        ///
        /// # Cancel safety
        /// No branch is left open when the future is dropped; calling it again opens one.
        pub async fn enlist<DB: SqlDatabase>(
            &self,
            store: &SqlStore<DB>,
        ) -> Result<Branch<'_, DB>> {
            self.typed(store, false).await
        }

        /// A branch that only reads: one snapshot, in which nothing is newer than this transaction.
        /// Where a write branch is open, that one is used.
        ///
        /// # Errors
        /// As [`Tx::enlist`].
        ///
        /// # Cancel safety
        /// As [`Tx::enlist`].
        pub async fn read<DB: SqlDatabase>(&self, store: &SqlStore<DB>) -> Result<Branch<'_, DB>> {
            self.typed(store, true).await
        }

        async fn typed<DB: SqlDatabase>(
            &self,
            store: &SqlStore<DB>,
            read_only: bool,
        ) -> Result<Branch<'_, DB>> {
            let name = crate::store::Store::name(store);
            self.core.settle_depth(self.depth);
            let branch = self.core.open(name, read_only).await?;
            Branch::of(branch).ok_or_else(|| {
                let detail = format!("store {name:?} is a database of another kind");
                Error::new(ErrorKind::Misuse, "enlist", detail)
            })
        }
    }
}

/// A transaction that has begun. Dropped without [`commit`](Transaction::commit), it rolls back in
/// the background.
///
/// A branch borrows its transaction, so a statement after the end does not compile:
///
/// ```compile_fail,E0505
/// # use palisade::{Coordinator, Error, SqlStore};
/// # async fn late(coordinator: Coordinator, bank: SqlStore<sqlx::Sqlite>) -> Result<(), Error> {
/// let tx = coordinator.transaction(["account:alice"]).begin().await?;
/// let db = tx.enlist(&bank).await?;
/// tx.commit().await?;
/// sqlx::query("DELETE FROM account").execute(&db).await?;
/// # Ok(()) }
/// ```
#[derive(Debug)]
#[must_use = "a transaction that is dropped rolls back"]
pub struct Transaction {
    tx: Tx,
}

impl Transaction {
    pub(super) fn new(core: Arc<Core>) -> Self {
        Self { tx: Tx { core, depth: 0 } }
    }

    pub(super) fn tx(&self) -> Tx {
        Tx { core: Arc::clone(&self.tx.core), depth: 0 }
    }

    /// Commits.
    ///
    /// `Ok` means that everything is durable. Every error but one means that nothing is there:
    /// [`LeaseLost`](ErrorKind::LeaseLost), [`Aborted`](ErrorKind::Aborted),
    /// [`Conflict`](ErrorKind::Conflict), [`Store`](ErrorKind::Store) and so on name the cause of
    /// the rollback.
    ///
    /// # Errors
    /// [`InDoubt`](ErrorKind::InDoubt) is the exception: whether the commit happened is not known,
    /// and [`Error::transaction`] names the attempt.
    ///
    /// # Cancel safety
    /// The commit goes on in the background, and its outcome is logged.
    pub async fn commit(self) -> Result<()> {
        self.tx.core.finish(End::Commit).await
    }

    /// Rolls back, and gives up the locks.
    ///
    /// # Errors
    /// [`Unavailable`](ErrorKind::Unavailable) or [`InDoubt`](ErrorKind::InDoubt) when the store
    /// did not acknowledge; its connection was closed then.
    ///
    /// # Cancel safety
    /// The rollback goes on in the background.
    pub async fn rollback(self) -> Result<()> {
        self.tx.core.finish(End::Rollback).await
    }
}

impl Drop for Transaction {
    fn drop(&mut self) {
        self.tx.core.abandon();
    }
}

impl Deref for Transaction {
    type Target = Tx;

    fn deref(&self) -> &Tx {
        &self.tx
    }
}

impl DerefMut for Transaction {
    fn deref_mut(&mut self) -> &mut Tx {
        &mut self.tx
    }
}
