//! A branch behind its handles: one connection, the line for it, and how far the branch has come.

use std::any::Any;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use tokio::sync::MutexGuard as LineGuard;
use tokio::time::timeout;

use crate::error::{Error, ErrorKind, Result};
use crate::sql::{Failed, classify, is_benign, refuse};
use crate::types::FencingToken;

use super::database::{Ending, Opened, SqlDatabase, Step};
use super::progress::{Progress, open_stream};
use super::sql_store::SqlStore;
use super::{AnyBranch, Fence, Held, Outcome};

/// A branch in one database.
pub struct BranchCore<DB: SqlDatabase> {
    store: SqlStore<DB>,
    fence: Fence,
    read_only: bool,
    /// The token that the store issued last; 0 where it issues none.
    issued: AtomicU64,
    progress: Mutex<Progress>,
    // Held across awaits on purpose: it is the line of statements for the one connection.
    line: tokio::sync::Mutex<Option<Opened<DB>>>,
}

impl<DB: SqlDatabase> fmt::Debug for BranchCore<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Branch")
            .field("store", &self.store.name())
            .field("attempt", &self.fence.attempt)
            .field("read_only", &self.read_only)
            .finish_non_exhaustive()
    }
}

impl<DB: SqlDatabase> BranchCore<DB> {
    /// A branch that was just fenced.
    pub(super) fn new(
        store: &SqlStore<DB>,
        fence: &Fence,
        read_only: bool,
        opened: Opened<DB>,
    ) -> Self {
        Self {
            store: store.clone(),
            fence: fence.clone(),
            read_only,
            issued: AtomicU64::new(opened.issued.map_or(0, FencingToken::get)),
            progress: Mutex::default(),
            line: tokio::sync::Mutex::new(Some(opened)),
        }
    }

    /// Waits for the connection on behalf of one statement.
    pub(super) async fn turn(&self) -> Result<Turn<'_, DB>, sqlx::Error> {
        self.admit(false).map_err(refuse)?;
        self.take_turn().await
    }

    /// Waits for the connection on behalf of a stream. From now on until the claim is dropped every
    /// other statement fails at once, because it might wait for the very task that reads the
    /// stream.
    pub(super) async fn stream_turn(
        &self,
    ) -> Result<(StreamClaim<'_, DB>, Turn<'_, DB>), sqlx::Error> {
        self.admit(false).map_err(refuse)?;
        self.progress().start_stream();
        let claim = StreamClaim(self);
        let turn = self.take_turn().await?;
        Ok((claim, turn))
    }

    async fn take_turn(&self) -> Result<Turn<'_, DB>, sqlx::Error> {
        let guard = self.line.lock().await;
        // Others may have failed, ended or lost the lease while this one stood in line.
        self.admit(true).map_err(refuse)?;
        let mut turn = Turn { core: self, guard, running: false };
        turn.undo_abandoned().await?;
        turn.running = true;
        Ok(turn)
    }

    fn admit(&self, in_line: bool) -> Result<()> {
        self.progress().admit(in_line)?;
        if self.fence.state.is_held() {
            return Ok(());
        }
        let detail = "the lease was lost, so another transaction may hold the keys now";
        Err(Error::new(ErrorKind::LeaseLost, "statement", detail)
            .with_transaction(self.fence.attempt))
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the connection for good, to end the branch. Waits for a lease at the longest: a
    /// statement that is neither polled nor dropped would keep it for ever.
    async fn take(&self, operation: &'static str) -> Result<Option<Opened<DB>>> {
        if self.progress().is_streaming() {
            return Err(open_stream(operation));
        }
        let Ok(mut line) = timeout(self.fence.lease.get(), self.line.lock()).await else {
            let detail = "a statement was neither finished nor dropped for a lease, so the \
                          connection could not be had; drop its future, or await it";
            return Err(Error::new(ErrorKind::Aborted, operation, detail)
                .with_transaction(self.fence.attempt));
        };
        Ok(line.take())
    }

    fn ending(&self, facts: DB::Facts) -> Ending<'_, DB> {
        Ending { store: &self.store, fence: &self.fence, read_only: self.read_only, facts }
    }

    /// Rolls back because the branch must not commit, and says so; unless even that is in doubt.
    async fn refuse_commit(&self, opened: Opened<DB>, why: Error, failed: bool) -> Outcome {
        let Opened { session, facts, .. } = opened;
        match DB::rollback(session, self.ending(facts), failed).await {
            Err(doubt) if doubt.is_in_doubt() => Outcome::InDoubt(doubt),
            // Without an answer the connection is closed; and no COMMIT was ever sent on it.
            Ok(()) | Err(_) => Outcome::RolledBack(why),
        }
    }

    /// Rolls back a savepoint that was abandoned. If that fails, the branch can only roll back.
    async fn undo_abandoned(&self, opened: &mut Opened<DB>) {
        let abandoned = self.progress().abandoned();
        let (Some(depth), Ok(conn)) = (abandoned, opened.session.conn()) else { return };
        self.progress().undone(depth);
        if let Err(error) = DB::savepoint(conn, Step::Undo, depth).await {
            self.progress().fail_for_good(Failed::of(&error));
        }
    }

    async fn savepoint_step(&self, step: Step, depth: u32) -> Result<()> {
        if step != Step::Undo {
            self.admit(false)?;
        }
        if self.progress().is_streaming() {
            return Err(open_stream("savepoint"));
        }
        let guard = self.line.lock().await;
        let mut turn = Turn { core: self, guard, running: false };
        if step == Step::Undo {
            return turn.undo(depth).await.map_err(|error| classify("savepoint", error));
        }
        self.admit(true)?;
        turn.undo_abandoned().await.map_err(|error| classify("savepoint", error))?;
        turn.running = true;
        if step == Step::Start {
            // Before the answer: a call that is cut short is undone with the savepoint.
            self.progress().set_depth(depth);
        }
        let result = DB::savepoint(turn.conn()?, step, depth).await;
        turn.finish(result).map_err(|error| classify("savepoint", error))?;
        if step == Step::Release {
            self.progress().set_depth(depth.saturating_sub(1));
        }
        Ok(())
    }
}

#[async_trait]
impl<DB: SqlDatabase> AnyBranch for BranchCore<DB> {
    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn issued(&self) -> Option<FencingToken> {
        FencingToken::new(self.issued.load(Ordering::Relaxed))
    }

    fn failure(&self) -> Option<Error> {
        self.progress().failure().map(Failed::error)
    }

    async fn extend(&self, held: &[Held]) -> Result<()> {
        let mut turn = self.turn().await.map_err(|error| classify("fence", error))?;
        let Some(opened) = turn.guard.as_mut() else { return Err(ended("fence")) };
        let result = DB::extend(&self.store, &self.fence, opened, held).await;
        self.issued.store(opened.issued.map_or(0, FencingToken::get), Ordering::Relaxed);
        turn.finish(result).map_err(|error| classify("fence", error))?
    }

    async fn savepoint(&self, depth: u32) -> Result<()> {
        self.savepoint_step(Step::Start, depth).await
    }

    async fn release_savepoint(&self, depth: u32) -> Result<()> {
        self.savepoint_step(Step::Release, depth).await
    }

    async fn rollback_to_savepoint(&self, depth: u32) -> Result<()> {
        self.savepoint_step(Step::Undo, depth).await
    }

    fn abandon_savepoint(&self, depth: u32) {
        self.progress().abandon(depth);
    }

    async fn commit(&self) -> Outcome {
        self.progress().close();
        let opened = match self.take("commit").await {
            Ok(Some(opened)) => opened,
            Ok(None) if self.progress().is_committing() => {
                return Outcome::InDoubt(doubt(&self.fence, "an earlier commit was cancelled"));
            }
            Ok(None) => return Outcome::RolledBack(ended("commit")),
            Err(error) => return Outcome::RolledBack(error),
        };
        let mut opened = opened;
        self.undo_abandoned(&mut opened).await;
        let failed = self.progress().failure().cloned();
        if let Some(failed) = failed {
            let detail = "a statement failed or was cancelled, so the transaction was rolled back";
            let why = Error::new(ErrorKind::Aborted, "commit", detail)
                .with_transaction(self.fence.attempt)
                .with_source(failed.error());
            return self.refuse_commit(opened, why, true).await;
        }
        if !self.fence.state.is_held() {
            let detail = "the lease was lost before the commit, so nothing was committed";
            let why = Error::new(ErrorKind::LeaseLost, "commit", detail)
                .with_transaction(self.fence.attempt);
            return self.refuse_commit(opened, why, false).await;
        }
        self.progress().start_commit();
        let Opened { session, facts, .. } = opened;
        DB::commit(session, self.ending(facts)).await
    }

    async fn rollback(&self) -> Result<()> {
        self.progress().close();
        let Some(Opened { session, facts, .. }) = self.take("rollback").await? else {
            if self.progress().is_committing() {
                return Err(doubt(&self.fence, "the branch was being committed"));
            }
            return Ok(());
        };
        let failed = self.progress().failure().is_some();
        DB::rollback(session, self.ending(facts), failed).await
    }

    fn close(&self) {
        self.progress().close();
    }

    async fn ping(&self) -> Result<()> {
        let Ok(mut guard) = self.line.try_lock() else { return Ok(()) };
        let Some(opened) = guard.as_mut() else { return Ok(()) };
        let result = DB::ping(opened.session.conn()?).await;
        if let Err(error) = &result {
            self.progress().fail(Failed::of(error));
        }
        result.map_err(|error| classify("ping", error))
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

/// The right to use the connection for one statement. Dropped before the statement has completed,
/// it marks the branch: what the server did with the statement is then not known.
pub(super) struct Turn<'b, DB: SqlDatabase> {
    core: &'b BranchCore<DB>,
    guard: LineGuard<'b, Option<Opened<DB>>>,
    running: bool,
}

impl<DB: SqlDatabase> Turn<'_, DB> {
    pub(super) fn conn(&mut self) -> Result<&mut DB::Connection> {
        match self.guard.as_mut() {
            Some(opened) => opened.session.conn(),
            None => Err(ended("statement")),
        }
    }

    /// The statement came back, with whatever result.
    pub(super) fn finish<T>(&mut self, result: Result<T, sqlx::Error>) -> Result<T, sqlx::Error> {
        self.running = false;
        if let Err(error) = &result
            && !is_benign(error)
        {
            self.core.progress().fail(Failed::of(error));
        }
        result
    }

    /// The connection, as sqlx wants to hear of its absence.
    pub(super) fn conn_or_refuse(&mut self) -> Result<&mut DB::Connection, sqlx::Error> {
        self.conn().map_err(refuse)
    }

    /// The connection for a stream, and what becomes of the branch with it.
    pub(super) fn conn_and_fate(
        &mut self,
    ) -> Result<(&mut DB::Connection, Fate<'_, DB>), sqlx::Error> {
        let fate = Fate { core: self.core, running: &mut self.running };
        match self.guard.as_mut() {
            Some(opened) => Ok((opened.session.conn().map_err(refuse)?, fate)),
            None => Err(refuse(ended("statement"))),
        }
    }

    async fn undo_abandoned(&mut self) -> Result<(), sqlx::Error> {
        let abandoned = self.core.progress().abandoned();
        match abandoned {
            Some(depth) => self.undo(depth).await,
            None => Ok(()),
        }
    }

    /// Rolls back to a savepoint. Cut short or refused, it leaves a branch that can only roll back.
    async fn undo(&mut self, depth: u32) -> Result<(), sqlx::Error> {
        self.core.progress().undone(depth);
        self.running = true;
        let conn = self.conn().map_err(refuse)?;
        let result = DB::savepoint(conn, Step::Undo, depth).await;
        self.running = false;
        if let Err(error) = &result {
            self.core.progress().fail_for_good(Failed::of(error));
        }
        result
    }
}

impl<DB: SqlDatabase> Drop for Turn<'_, DB> {
    fn drop(&mut self) {
        if self.running {
            self.core.progress().fail(Failed::cancelled());
        }
    }
}

/// What a stream does to its branch: nothing once its first item has come, because then the server
/// has done, or will do, all of the statement.
pub(super) struct Fate<'t, DB: SqlDatabase> {
    core: &'t BranchCore<DB>,
    running: &'t mut bool,
}

impl<DB: SqlDatabase> Fate<'_, DB> {
    /// An item or an error came.
    pub(super) fn item<T>(&mut self, item: Result<T, sqlx::Error>) -> Result<T, sqlx::Error> {
        *self.running = false;
        if let Err(error) = &item
            && !is_benign(error)
        {
            self.core.progress().fail(Failed::of(error));
        }
        item
    }

    /// The stream has ended.
    pub(super) fn done(self) {
        *self.running = false;
    }
}

/// While it lives, a stream has the connection or stands in line for it.
pub(super) struct StreamClaim<'b, DB: SqlDatabase>(&'b BranchCore<DB>);

impl<DB: SqlDatabase> Drop for StreamClaim<'_, DB> {
    fn drop(&mut self) {
        self.0.progress().end_stream();
    }
}

/// The outcome of this attempt is not known.
pub(super) fn doubt(fence: &Fence, detail: &'static str) -> Error {
    Error::new(ErrorKind::InDoubt, "commit", detail).with_transaction(fence.attempt)
}

fn ended(operation: &'static str) -> Error {
    Error::new(ErrorKind::Misuse, operation, "the branch has ended")
}
