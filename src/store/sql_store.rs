//! A database as a store: its pool, its name, its settings.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use sqlx::Pool;
use sqlx::pool::PoolConnection;
use tokio::sync::OnceCell;
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::sql::classify;
use crate::types::Status;

use super::core::BranchCore;
use super::database::SqlDatabase;
use super::{AnyBranch, Fence, Issuer, Store, StoreHealth};

/// How long a statement may run unless the store says otherwise.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);

/// An SQL database that takes part in transactions.
///
/// Cheap to clone; clones share the pool.
///
/// ```
/// # #[cfg(feature = "sqlite")]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # tokio::runtime::Runtime::new()?.block_on(async {
/// use palisade::SqlStore;
/// use sqlx::sqlite::SqlitePoolOptions;
///
/// let pool = SqlitePoolOptions::new().max_connections(1).connect("sqlite::memory:").await?;
/// let bank = SqlStore::new("bank", pool);
/// bank.migrate().await?;
/// # Ok(()) })
/// # }
/// # #[cfg(not(feature = "sqlite"))]
/// # fn main() {}
/// ```
pub struct SqlStore<DB: SqlDatabase> {
    name: Arc<str>,
    pool: Pool<DB>,
    statement_timeout: Duration,
    /// [`Driver::FENCE`](super::database::Driver::FENCE), unless a test has edited it.
    pub(crate) fence: &'static str,
    /// [`Driver::STORE_FENCE`](super::database::Driver::STORE_FENCE), likewise.
    pub(crate) store_fence: &'static str,
    pub(super) settings: DB::Settings,
    id: Arc<OnceCell<Uuid>>,
    /// Why the last branch could not be opened, if the database was not reached.
    out_of_reach: Arc<Mutex<Option<String>>>,
    pub(super) shared: Arc<DB::Shared>,
}

/// What one round of [`SqlStore::purge`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Purged {
    /// How many rows are gone.
    pub rows: u64,
    /// Tokens at or below this one are refused from now on; 0 before anything was purged.
    pub watermark: u64,
}

impl<DB: SqlDatabase> SqlStore<DB> {
    /// The database behind `pool`, under a name of the program's choice. Does no I/O.
    #[must_use]
    pub fn new(name: impl AsRef<str>, pool: Pool<DB>) -> Self {
        Self {
            name: name.as_ref().into(),
            pool,
            statement_timeout: STATEMENT_TIMEOUT,
            fence: DB::FENCE,
            store_fence: DB::STORE_FENCE,
            settings: DB::Settings::default(),
            id: Arc::default(),
            out_of_reach: Arc::default(),
            shared: Arc::default(),
        }
    }

    /// How long a statement of a branch may run at the server: 30 s unless set. SQLite, which runs
    /// in this process, knows no such limit.
    #[must_use]
    pub fn statement_timeout(mut self, timeout: Duration) -> Self {
        self.statement_timeout = timeout;
        self
    }

    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The pool, for work outside of transactions.
    #[must_use]
    pub fn pool(&self) -> &Pool<DB> {
        &self.pool
    }

    /// Creates palisade's tables, or brings them up to date.
    ///
    /// May run any number of times and in many processes at once, and beside migrations of the
    /// program's own: palisade remembers its migrations in a table of its own.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] when the database cannot be reached; [`ErrorKind::Denied`] when
    /// the role may not create tables; [`ErrorKind::NotMigrated`] when the tables were made by
    /// another version of palisade; [`ErrorKind::Store`] otherwise.
    ///
    /// # Cancel safety
    /// A dropped call leaves each migration done or not done, and may be repeated.
    pub async fn migrate(&self) -> Result<()> {
        DB::migrate(self).await
    }

    /// Deletes what no transaction needs any more: fence rows that nobody touched for `older_than`.
    ///
    /// Call it now and then, from any number of processes. A call moves the watermark, below which
    /// tokens are refused, and deletes the rows below the watermark of an *earlier* call, if that
    /// was 10 s ago or longer; so the first call deletes nothing. Choose `older_than` well above
    /// the longest time for which a key is held: a transaction with an older token is told to start
    /// over.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`], [`ErrorKind::NotMigrated`], [`ErrorKind::Conflict`] when the
    /// database was busy, [`ErrorKind::Store`] otherwise.
    ///
    /// # Cancel safety
    /// A dropped call has moved the watermark or not, and deleted some rows or none; each is sound.
    pub async fn purge(&self, older_than: Duration) -> Result<Purged> {
        DB::purge(self, older_than).await
    }

    /// Opens a branch that may write.
    pub(crate) async fn open_typed(&self, fence: &Fence) -> Result<Arc<BranchCore<DB>>> {
        check(fence)?;
        if !fence.writes() {
            let detail = "a branch that writes needs a key that is held exclusively, so that a \
                          lost commit can be settled; use read, or declare a key exclusively";
            return Err(Error::new(ErrorKind::Misuse, "enlist", detail));
        }
        let opened = self.noted(bounded("enlist", fence, DB::open(self, fence)).await)?;
        Ok(Arc::new(BranchCore::new(self, fence, false, opened)))
    }

    /// Opens a branch that reads one snapshot.
    pub(crate) async fn open_read_typed(&self, fence: &Fence) -> Result<Arc<BranchCore<DB>>> {
        check(fence)?;
        let opened = self.noted(bounded("read", fence, DB::open_read(self, fence)).await)?;
        Ok(Arc::new(BranchCore::new(self, fence, true, opened)))
    }

    /// Takes note for the health.
    fn noted<T>(&self, opened: Result<T>) -> Result<T> {
        let why = opened.as_ref().err().filter(|error| error.is_unavailable());
        let why = why.map(ToString::to_string);
        *self.out_of_reach.lock().unwrap_or_else(PoisonError::into_inner) = why;
        opened
    }

    /// The statement that takes the rows of a fence.
    pub(super) fn statement(&self, fence: &Fence) -> &'static str {
        match fence.issuer {
            Issuer::LockService => self.fence,
            Issuer::Store => self.store_fence,
        }
    }

    /// How long a statement of a branch may run.
    #[cfg(feature = "postgres")]
    pub(super) fn limit(&self) -> Duration {
        self.statement_timeout
    }

    /// A connection from the pool, waited for until `deadline` at the longest.
    pub(super) async fn acquire(
        &self,
        operation: &'static str,
        deadline: Instant,
    ) -> Result<PoolConnection<DB>> {
        let acquired = match timeout_at(deadline, self.pool.acquire()).await {
            Ok(acquired) => acquired,
            Err(_) => Err(sqlx::Error::PoolTimedOut),
        };
        acquired.map_err(|error| {
            let name = self.name();
            let detail = match &error {
                sqlx::Error::PoolTimedOut => format!(
                    "the pool of store {name:?} had no connection in time ({} open, {} idle); \
                     raise max_connections, or hold fewer branches",
                    self.pool.size(),
                    self.pool.num_idle()
                ),
                sqlx::Error::PoolClosed => format!("the pool of store {name:?} was closed"),
                _ => return classify(operation, error),
            };
            Error::new(ErrorKind::Unavailable, operation, detail).with_source(error)
        })
    }
}

/// Ends an attempt to open a branch that is stuck: an answer that never comes must not outlive the
/// deadline by more than the time that a server needs to say why.
///
/// A process that was stopped meanwhile finds its session gone; what it has to know is that the
/// lease is.
async fn bounded<T>(
    operation: &'static str,
    fence: &Fence,
    open: impl Future<Output = Result<T>>,
) -> Result<T> {
    let patience = fence.deadline + Duration::from_secs(1);
    let opened = timeout_at(patience, open).await.unwrap_or_else(|_| {
        let detail = "the store did not answer within the deadline";
        Err(Error::new(ErrorKind::Unavailable, operation, detail).with_transaction(fence.attempt))
    });
    match opened {
        Err(error) if error.kind() != ErrorKind::StaleToken && !fence.state.is_held() => {
            Err(lease_lost(operation, fence).with_source(error))
        }
        opened => opened,
    }
}

fn lease_lost(operation: &'static str, fence: &Fence) -> Error {
    let detail = "the lease was lost, so another transaction may hold the keys now";
    Error::new(ErrorKind::LeaseLost, operation, detail).with_transaction(fence.attempt)
}

fn check(fence: &Fence) -> Result<()> {
    if fence.held.is_empty() {
        let detail = "a branch without a key has no fence; lock what it changes";
        return Err(Error::new(ErrorKind::Misuse, "enlist", detail));
    }
    if !fence.state.is_held() {
        return Err(lease_lost("enlist", fence));
    }
    Ok(())
}

impl<DB: SqlDatabase> Clone for SqlStore<DB> {
    fn clone(&self) -> Self {
        Self {
            name: Arc::clone(&self.name),
            pool: self.pool.clone(),
            statement_timeout: self.statement_timeout,
            fence: self.fence,
            store_fence: self.store_fence,
            settings: self.settings.clone(),
            id: Arc::clone(&self.id),
            out_of_reach: Arc::clone(&self.out_of_reach),
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<DB: SqlDatabase> fmt::Debug for SqlStore<DB> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqlStore").field("name", &self.name()).finish_non_exhaustive()
    }
}

#[async_trait]
impl<DB: SqlDatabase> Store for SqlStore<DB> {
    fn name(&self) -> &str {
        self.name()
    }

    async fn id(&self) -> Result<Uuid> {
        let read = async || {
            DB::id(self).await?.ok_or_else(|| {
                let detail = "palisade_store has no row, so the store has no id; was it emptied?";
                Error::new(ErrorKind::NotMigrated, "store id", detail)
            })
        };
        self.id.get_or_try_init(read).await.copied()
    }

    async fn open(&self, fence: &Fence) -> Result<Arc<dyn AnyBranch>> {
        Ok(self.open_typed(fence).await?)
    }

    async fn open_read(&self, fence: &Fence) -> Result<Arc<dyn AnyBranch>> {
        Ok(self.open_read_typed(fence).await?)
    }

    fn health(&self) -> StoreHealth {
        let why = self.out_of_reach.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let (status, reason) = match why {
            _ if self.pool.is_closed() => (Status::Down, Some("its pool was closed".to_owned())),
            Some(why) => (Status::Degraded, Some(why)),
            None => (Status::Up, None),
        };
        let idle = u32::try_from(self.pool.num_idle()).ok();
        let connections = Some(self.pool.size());
        StoreHealth { status, reason, connections, idle, ..StoreHealth::new(self.name()) }
    }
}
