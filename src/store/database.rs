//! What differs between the databases.

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use sqlx::pool::PoolConnection;
use uuid::Uuid;

use crate::error::{Error, Result};
use crate::types::FencingToken;

use super::session::Session;
use super::sql_store::{Purged, SqlStore};
use super::{Fence, Held, Outcome};

/// A database that can take part in transactions: `sqlx::Sqlite` with the feature `sqlite`,
/// `sqlx::Postgres` with the feature `postgres`.
///
/// Sealed: how a fence is taken and how a commit is proven has to be known for each.
pub trait SqlDatabase: Driver {}

impl<DB: Driver> SqlDatabase for DB {}

/// A branch right after its fence.
pub struct Opened<DB: SqlDatabase> {
    pub(super) session: Session<DB>,
    pub(super) facts: DB::Facts,
    /// The token that the store issued last.
    pub(super) issued: Option<FencingToken>,
}

/// What a branch needs to know while it ends: all but the connection.
pub struct Ending<'b, DB: SqlDatabase> {
    pub(super) store: &'b SqlStore<DB>,
    pub(super) fence: &'b Fence,
    pub(super) read_only: bool,
    pub(super) facts: DB::Facts,
}

/// The driver of one database.
#[async_trait]
pub trait Driver: sqlx::Database + Sized {
    /// What goes back with a connection, such as a setting to restore.
    type Loan: Default + Send + Sync + 'static;
    /// What the fence told: how to know the transaction again, what was there before it.
    type Facts: fmt::Debug + Send + Sync + 'static;
    /// What a program can set beyond what every database has.
    type Settings: fmt::Debug + Clone + Default + Send + Sync + 'static;
    /// What the branches of one store share in this process.
    type Shared: fmt::Debug + Default + Send + Sync + 'static;

    /// The statement that shows the tokens to the fence rows.
    const FENCE: &'static str;
    /// The statement that takes the fence rows and issues the token.
    const STORE_FENCE: &'static str;

    /// Takes a connection whose state is unproven. Must not block, panic or do I/O itself.
    fn discard(conn: PoolConnection<Self>, loan: Self::Loan);

    /// Creates or updates palisade's tables.
    async fn migrate(store: &SqlStore<Self>) -> Result<()>;

    /// Reads the UUID of the store.
    async fn id(store: &SqlStore<Self>) -> Result<Option<Uuid>>;

    /// One round of the purge.
    async fn purge(store: &SqlStore<Self>, older_than: Duration) -> Result<Purged>;

    /// Begins, fences, and returns the open transaction.
    async fn open(store: &SqlStore<Self>, fence: &Fence) -> Result<Opened<Self>>;

    /// Stamps, commits that, and returns a snapshot in which nothing is newer than the fence. Where
    /// the store issues the token, the rows are kept instead.
    async fn open_read(store: &SqlStore<Self>, fence: &Fence) -> Result<Opened<Self>>;

    /// Fences further keys in the open transaction. The outer error says that the transaction was
    /// hurt, the inner one that the keys were refused and the transaction is as it was.
    async fn extend(
        store: &SqlStore<Self>,
        fence: &Fence,
        open: &mut Opened<Self>,
        held: &[Held],
    ) -> Result<Result<()>, sqlx::Error>;

    /// Starts, releases or undoes the savepoint at a depth.
    async fn savepoint(
        conn: &mut Self::Connection,
        step: Step,
        depth: u32,
    ) -> Result<(), sqlx::Error>;

    /// Commits, and finds out what became of it when the reply is lost.
    async fn commit(session: Session<Self>, ending: Ending<'_, Self>) -> Outcome;

    /// Rolls back. Fails in doubt when the transaction was not the one that was fenced.
    ///
    /// `failed` says that a statement failed or was cancelled.
    async fn rollback(
        session: Session<Self>,
        ending: Ending<'_, Self>,
        failed: bool,
    ) -> Result<(), Error>;

    /// Keeps the session from being idle.
    async fn ping(conn: &mut Self::Connection) -> Result<(), sqlx::Error>;
}

/// What is done with a savepoint.
// exhaustive: every driver does all three.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// It is set.
    Start,
    /// What came since is kept.
    Release,
    /// What came since is undone, and the savepoint is gone.
    Undo,
}

impl Step {
    /// The statements for the savepoint at `depth`, in the words of the SQL standard.
    pub(super) fn sql(self, depth: u32) -> String {
        match self {
            Step::Start => format!("SAVEPOINT palisade_{depth}"),
            Step::Release => format!("RELEASE SAVEPOINT palisade_{depth}"),
            Step::Undo => format!(
                "ROLLBACK TO SAVEPOINT palisade_{depth}; RELEASE SAVEPOINT palisade_{depth}"
            ),
        }
    }
}
