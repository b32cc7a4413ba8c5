//! A transaction within a transaction: locks re-entered or added, and a savepoint in each branch.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::store::{AnyBranch, Held};
use crate::types::{FencingToken, Mode, ResourceKey, Want};

use super::core::{Core, Tx};
use super::fallback::Ground;

impl Tx {
    /// Begins a nested transaction that holds `keys` too, if any are named.
    ///
    /// Keys that the transaction holds are re-entered; others are added if that cannot deadlock,
    /// and are fenced in the open branches *before* the savepoint, because rolling back to it must
    /// not undo the fence. All locks are kept until the outermost transaction ends. For the same
    /// reason only the outermost nested transaction adds keys where a branch is open; one within
    /// another fails with the keys to declare.
    ///
    /// # Errors
    /// Those of [`LockRequest::acquire`](crate::LockRequest::acquire) and of the stores.
    /// [`WouldDeadlock`](crate::ErrorKind::WouldDeadlock) names the keys to declare from the start;
    /// [`run`](super::Coordinator::run) does that by itself.
    ///
    /// # Cancel safety
    /// Dropping the future undoes the savepoints before the next statement; locks that were added
    /// stay until the transaction ends.
    pub async fn nested<K: AsRef<str>>(
        &mut self,
        keys: impl IntoIterator<Item = K>,
    ) -> Result<Nested<'_>> {
        let core = Arc::clone(&self.core);
        core.check("nested")?;
        core.settle_depth(self.depth);
        let keys: Vec<String> = keys.into_iter().map(|key| key.as_ref().to_owned()).collect();
        core.add_keys(&keys).await.map_err(|error| core.note(error))?;
        let _one_at_a_time = core.one_at_a_time().await;
        let depth = {
            let mut books = core.books();
            books.depth += 1;
            books.depth
        };
        // From here on, dropping `nested` undoes what was set.
        let tx = Tx { core: Arc::clone(&core), depth };
        let nested = Nested { tx, depth, open: true, outer: PhantomData };
        for branch in core.branches() {
            branch.savepoint(depth).await.map_err(|error| core.note(error))?;
        }
        core.forget_advice();
        Ok(nested)
    }
}

impl Core {
    /// Locks what is not held yet, and fences what is not fenced yet: an earlier call may have
    /// locked a key and failed to fence it.
    async fn add_keys(&self, keys: &[String]) -> Result<()> {
        let _one_at_a_time = self.one_at_a_time().await;
        let new: Vec<&String> =
            keys.iter().filter(|key| !self.holds(key, Mode::Exclusive)).collect();
        self.refuse_within_savepoint(&new)?;
        if self.ground == Ground::Rows {
            return self.add_rows(&new).await;
        }
        if !new.is_empty() {
            let request = self.locks.lock_all(new).owner(self.owner).ttl(self.lease.get());
            let request = request.wait(self.wait).retry(self.retry).floor(self.floor);
            let guard = request.state(Arc::clone(&self.state)).acquire().await?;
            self.take(guard)?;
        }
        let unfenced = self.books().unfenced.clone();
        if !unfenced.is_empty() {
            for branch in self.branches() {
                branch.extend(&unfenced).await?;
            }
            self.books().unfenced.clear();
        }
        Ok(())
    }

    /// Takes the rows of further keys, which are the locks. Each store is tried, and nobody waits
    /// in line there, so it may be a deadlock that is in the way.
    async fn add_rows(&self, keys: &[&String]) -> Result<()> {
        let token = self.books().held.iter().map(|held| held.token).max();
        let token = token.unwrap_or(FencingToken::FIRST);
        let mode = Mode::Exclusive;
        let added = keys.iter().map(|key| Ok(Held { key: ResourceKey::parse(key)?, mode, token }));
        let mut added = added.collect::<Result<Vec<_>>>()?;
        added.sort_by(|a, b| a.key.cmp(&b.key));
        added.dedup_by(|b, a| a.key == b.key);
        if added.is_empty() {
            return Ok(());
        }
        let mut issued = token;
        for branch in self.branches() {
            branch.extend(&added).await.map_err(|error| declare(error, &added))?;
            issued = issued.max(branch.issued().unwrap_or(token));
        }
        self.issued(Some(added), issued);
        Ok(())
    }

    /// A fence within a savepoint would be undone with it, and so would the locks on the rows,
    /// while the keys stay in the books: writes under them would go on without either.
    fn refuse_within_savepoint(&self, new: &[&String]) -> Result<()> {
        let (depth, branches, unfenced) = {
            let books = self.books();
            (books.depth, books.slots.len(), books.unfenced.clone())
        };
        if depth == 0 || branches == 0 || (new.is_empty() && unfenced.is_empty()) {
            return Ok(());
        }
        let new = new.iter().map(|key| Ok(Want::new(ResourceKey::parse(key)?, Mode::Exclusive)));
        let mut wants = new.collect::<Result<Vec<_>>>()?;
        wants.extend(unfenced.into_iter().map(|held| Want::new(held.key, held.mode)));
        let detail = "a nested transaction within another cannot add keys to an open branch, \
                      because undoing the outer one would undo their fence; declare all keys \
                      together at the start";
        Err(Error::new(ErrorKind::WouldDeadlock, "nested", detail).with_declare(wants))
    }

    fn branches(&self) -> Vec<Arc<dyn AnyBranch>> {
        self.books().slots.iter().map(|slot| Arc::clone(&slot.branch)).collect()
    }
}

/// Rows that did not come free in time are to be had together with the others, from the start.
fn declare(error: Error, added: &[Held]) -> Error {
    if error.kind() != ErrorKind::Conflict {
        return error;
    }
    let wants = added.iter().map(|held| Want::new(held.key.clone(), held.mode)).collect();
    let detail = "another branch has the rows of these keys, and waiting for them could deadlock; \
                  declare all keys together at the start";
    Error::new(ErrorKind::WouldDeadlock, "nested", detail).with_declare(wants).with_source(error)
}

/// A nested transaction. Dropped without [`commit`](Nested::commit), it is undone before the next
/// statement of the outer one.
///
/// It borrows the outer transaction, so that no statement of the outer one can slip in between.
#[derive(Debug)]
#[must_use = "a nested transaction that is dropped is undone"]
pub struct Nested<'t> {
    tx: Tx,
    depth: u32,
    open: bool,
    outer: PhantomData<&'t mut Tx>,
}

impl Nested<'_> {
    /// Keeps what was done; it is final when the outermost transaction commits.
    ///
    /// # Errors
    /// [`LeaseLost`](crate::ErrorKind::LeaseLost), and the errors of the stores; what was done is
    /// undone then.
    ///
    /// # Cancel safety
    /// Dropping the future undoes what was done.
    pub async fn commit(mut self) -> Result<()> {
        let core = Arc::clone(&self.tx.core);
        core.check("commit nested")?;
        core.settle_depth(self.depth);
        let noted = |error: Error| core.note(error);
        for branch in core.branches() {
            branch.release_savepoint(self.depth).await.map_err(noted)?;
        }
        self.close();
        Ok(())
    }

    /// Undoes what was done.
    ///
    /// # Errors
    /// The errors of the stores; the branch can only roll back then.
    ///
    /// # Cancel safety
    /// What was done is undone before the next statement.
    pub async fn rollback(mut self) -> Result<()> {
        let core = Arc::clone(&self.tx.core);
        core.settle_depth(self.depth);
        let noted = |error: Error| core.note(error);
        for branch in core.branches() {
            branch.rollback_to_savepoint(self.depth).await.map_err(noted)?;
        }
        self.close();
        Ok(())
    }

    fn close(&mut self) {
        self.open = false;
        self.tx.core.books().depth = self.depth - 1;
    }
}

impl Drop for Nested<'_> {
    fn drop(&mut self) {
        if self.open {
            for branch in self.tx.core.branches() {
                branch.abandon_savepoint(self.depth);
            }
            self.close();
        }
    }
}

impl Deref for Nested<'_> {
    type Target = Tx;

    fn deref(&self) -> &Tx {
        &self.tx
    }
}

impl DerefMut for Nested<'_> {
    fn deref_mut(&mut self) -> &mut Tx {
        &mut self.tx
    }
}
