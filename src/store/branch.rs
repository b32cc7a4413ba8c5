//! The typed handle of a branch: an sqlx executor for statements behind the fence.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use futures_core::future::BoxFuture;
use futures_core::stream::BoxStream;
use futures_util::StreamExt;
use sqlx::{Database, Either, Execute, Executor, SqlStr};

use super::AnyBranch;
use super::core::BranchCore;
use super::database::SqlDatabase;

/// A branch of a transaction in one database. `&branch` is an sqlx executor.
///
/// A branch exists only after the fence rows of the transaction's keys were changed in it, and it
/// borrows the transaction, so no statement can come before the check or after the end. It has no
/// `Drop`: committing and rolling back is up to the transaction.
///
/// A branch is *one* connection. Statements that run side by side stand in line for it; a statement
/// that is sent while a stream of the branch (`fetch`, `fetch_many`) is open fails at once with
/// [`ErrorKind::Misuse`](crate::ErrorKind::Misuse), because waiting for a stream that the same task
/// reads would never end. Every statement first checks that the lease is still held. Errors of
/// palisade come as [`sqlx::Error`]; `?` in a function that returns
/// [`palisade::Result`](crate::Result) turns them back.
///
/// A statement that failed, or whose future was dropped before it had completed, leaves a branch
/// that can only roll back, unless it happened within a nested transaction that is rolled back. Do
/// not send `BEGIN`, `COMMIT`, `ROLLBACK` or `SAVEPOINT` through a branch: SQL is not parsed, so
/// that is found out at the end, and then the outcome is in doubt.
///
/// # Cancel safety
/// Dropping a statement's future marks the branch as failed, and the transaction can only roll
/// back. Dropping a stream does so only before its first item.
pub struct Branch<'t, DB: SqlDatabase> {
    core: Arc<BranchCore<DB>>,
    transaction: PhantomData<&'t ()>,
}

impl<'t, DB: SqlDatabase> Branch<'t, DB> {
    /// The typed handle of a branch that was opened by [`Store::open`](super::Store::open); `None`
    /// if it is a branch in a database of another type. Transactions do this in `enlist`.
    #[must_use]
    pub fn on(branch: &'t Arc<dyn AnyBranch>) -> Option<Self> {
        Self::of(Arc::clone(branch))
    }

    /// The same, for as long as the caller's transaction lives.
    #[must_use]
    pub(crate) fn of(branch: Arc<dyn AnyBranch>) -> Option<Self> {
        let core = branch.as_any().downcast::<BranchCore<DB>>().ok()?;
        Some(Self { core, transaction: PhantomData })
    }
}

impl<DB: SqlDatabase> fmt::Debug for Branch<'_, DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.core, f)
    }
}

impl<'c, DB: SqlDatabase> Executor<'c> for &'c Branch<'_, DB>
where
    for<'x> &'x mut DB::Connection: Executor<'x, Database = DB>,
    DB::QueryResult: Send,
{
    type Database = DB;

    fn execute<'e, 'q: 'e, E>(
        self,
        query: E,
    ) -> BoxFuture<'e, Result<<DB as Database>::QueryResult, sqlx::Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, DB>,
    {
        Box::pin(async move {
            let mut turn = self.core.turn().await?;
            let result = turn.conn_or_refuse()?.execute(query).await;
            turn.finish(result)
        })
    }

    fn fetch_all<'e, 'q: 'e, E>(
        self,
        query: E,
    ) -> BoxFuture<'e, Result<Vec<<DB as Database>::Row>, sqlx::Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, DB>,
    {
        Box::pin(async move {
            let mut turn = self.core.turn().await?;
            let result = turn.conn_or_refuse()?.fetch_all(query).await;
            turn.finish(result)
        })
    }

    fn fetch_one<'e, 'q: 'e, E>(
        self,
        query: E,
    ) -> BoxFuture<'e, Result<<DB as Database>::Row, sqlx::Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, DB>,
    {
        Box::pin(async move {
            let mut turn = self.core.turn().await?;
            let result = turn.conn_or_refuse()?.fetch_one(query).await;
            turn.finish(result)
        })
    }

    fn fetch_optional<'e, 'q: 'e, E>(
        self,
        query: E,
    ) -> BoxFuture<'e, Result<Option<<DB as Database>::Row>, sqlx::Error>>
    where
        'c: 'e,
        E: 'q + Execute<'q, DB>,
    {
        Box::pin(async move {
            let mut turn = self.core.turn().await?;
            let result = turn.conn_or_refuse()?.fetch_optional(query).await;
            turn.finish(result)
        })
    }

    fn fetch_many<'e, 'q: 'e, E>(
        self,
        query: E,
    ) -> BoxStream<
        'e,
        Result<Either<<DB as Database>::QueryResult, <DB as Database>::Row>, sqlx::Error>,
    >
    where
        'c: 'e,
        E: 'q + Execute<'q, DB>,
    {
        Box::pin(async_stream::try_stream! {
            let (_claim, mut turn) = self.core.stream_turn().await?;
            let (conn, mut fate) = turn.conn_and_fate()?;
            let mut items = conn.fetch_many(query);
            while let Some(item) = items.next().await {
                yield fate.item(item)?;
            }
            fate.done();
        })
    }

    fn prepare_with<'e>(
        self,
        sql: SqlStr,
        parameters: &'e [<DB as Database>::TypeInfo],
    ) -> BoxFuture<'e, Result<<DB as Database>::Statement, sqlx::Error>>
    where
        'c: 'e,
    {
        Box::pin(async move {
            let mut turn = self.core.turn().await?;
            let result = turn.conn_or_refuse()?.prepare_with(sql, parameters).await;
            turn.finish(result)
        })
    }
}
