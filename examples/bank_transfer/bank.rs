//! The bank: its tables, and the transaction that this program is about.

use std::collections::{BTreeMap, BTreeSet};

use palisade::{Coordinator, Locks, SqlStore, TransactionRequest, Tx};
use sqlx::postgres::{PgPoolOptions, Postgres};
use sqlx::sqlite::{Sqlite, SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions};

use crate::Result;
use crate::input::{Books, Transfer};
use crate::options::Options;

/// A bank in a database of either kind.
#[derive(Clone, Debug)]
pub enum Bank {
    Sqlite(SqlStore<Sqlite>),
    Postgres(SqlStore<Postgres>),
}

/// What became of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    Moved,
    /// For lack of funds.
    Refused,
    /// An earlier transaction did it, whose outcome was not known.
    Before,
}

/// Does the same with a store of either kind. The SQL is the same; the types are not.
macro_rules! either {
    ($bank:expr, $store:ident => $work:expr) => {
        match $bank {
            Bank::Sqlite($store) => $work,
            Bank::Postgres($store) => $work,
        }
    };
}

impl Bank {
    /// Moves the money, in a transaction that holds both accounts, and remembers that it did.
    ///
    /// It reads, computes and writes as programs do. Nothing but the fence keeps a worker that was
    /// stopped in between from writing over what others have written since: at READ COMMITTED the
    /// database would let it.
    pub async fn apply(&self, tx: &Tx, transfer: &Transfer) -> palisade::Result<Applied> {
        let Transfer { id, from, to, amount_cents } = transfer;
        either!(self, store => {
            let db = tx.enlist(store).await?;
            let new = sqlx::query(REMEMBER).bind(id).execute(&db).await?;
            if new.rows_affected() == 0 {
                return Ok(Applied::Before);
            }
            let payer: i64 = sqlx::query_scalar(BALANCE).bind(from).fetch_one(&db).await?;
            if payer < *amount_cents {
                sqlx::query(REFUSE).bind(id).execute(&db).await?;
                return Ok(Applied::Refused);
            }
            let payee: i64 = sqlx::query_scalar(BALANCE).bind(to).fetch_one(&db).await?;
            sqlx::query(SET_BALANCE).bind(payer - amount_cents).bind(from).execute(&db).await?;
            sqlx::query(SET_BALANCE).bind(payee + amount_cents).bind(to).execute(&db).await?;
        });
        Ok(Applied::Moved)
    }

    /// Connects to the database at `url`, with as many connections as there are tasks.
    pub async fn open(url: &str, tasks: u32) -> Result<Self> {
        if let Some(path) = url.strip_prefix("sqlite:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            // The safest setting of SQLite stays on: each commit is forced to the disk.
            let options = SqliteConnectOptions::new()
                .filename(path)
                .create_if_missing(true)
                .journal_mode(SqliteJournalMode::Wal);
            let pool = SqlitePoolOptions::new().max_connections(tasks.min(4));
            return Ok(Self::Sqlite(SqlStore::new("bank", pool.connect_with(options).await?)));
        }
        let pool = PgPoolOptions::new().max_connections(tasks).connect(url).await?;
        Ok(Self::Postgres(SqlStore::new("bank", pool)))
    }

    /// A coordinator of transactions over this bank.
    pub fn coordinator(&self, locks: Locks, options: &Options) -> Coordinator {
        let builder = Coordinator::builder(locks).lease(options.lease());
        let builder = builder.fallback(options.fallback.fallback());
        either!(self, store => builder.store(store)).build()
    }

    /// The same transaction, with a branch in this bank from the start.
    pub fn declare(&self, request: TransactionRequest) -> TransactionRequest {
        either!(self, store => request.stores([store]))
    }

    /// Makes the tables anew, with these accounts.
    pub async fn create(&self, opening: &BTreeMap<String, i64>) -> Result<()> {
        either!(self, store => {
            store.migrate().await?;
            let mut tx = store.pool().begin().await?;
            sqlx::raw_sql(TABLES).execute(&mut *tx).await?;
            for (name, cents) in opening {
                sqlx::query(OPEN).bind(name).bind(cents).execute(&mut *tx).await?;
            }
            tx.commit().await?;
        });
        Ok(())
    }

    /// The transfers that need not be tried any more.
    pub async fn applied(&self) -> Result<BTreeSet<i64>> {
        let ids: Vec<i64> = either!(self, store => {
            sqlx::query_scalar(APPLIED).fetch_all(store.pool()).await?
        });
        Ok(ids.into_iter().collect())
    }

    /// The books as they are now.
    pub async fn books(&self) -> Result<Books> {
        let balances: Vec<(String, i64)>;
        let (applied, refused): (i64, i64);
        either!(self, store => {
            balances = sqlx::query_as(BALANCES).fetch_all(store.pool()).await?;
            (applied, refused) = sqlx::query_as(COUNTS).fetch_one(store.pool()).await?;
        });
        Ok(Books {
            balances: balances.into_iter().collect(),
            applied: usize::try_from(applied)?,
            refused: usize::try_from(refused)?,
        })
    }
}

const TABLES: &str = "
    DROP TABLE IF EXISTS bank_transfer_accounts;
    DROP TABLE IF EXISTS bank_transfer_applied;
    CREATE TABLE bank_transfer_accounts (
        name TEXT PRIMARY KEY,
        balance_cents BIGINT NOT NULL CHECK (balance_cents >= 0)
    );
    CREATE TABLE bank_transfer_applied (id BIGINT PRIMARY KEY, refused BIGINT NOT NULL);";
const OPEN: &str = "INSERT INTO bank_transfer_accounts (name, balance_cents) VALUES ($1, $2)";
/// Written in the same transaction as the balances, so that one is there if and only if the other
/// is. Whoever does not know what became of a transfer asks for its id.
const REMEMBER: &str = "
    INSERT INTO bank_transfer_applied (id, refused) VALUES ($1, 0) ON CONFLICT (id) DO NOTHING";
const REFUSE: &str = "UPDATE bank_transfer_applied SET refused = 1 WHERE id = $1";
const BALANCE: &str = "SELECT balance_cents FROM bank_transfer_accounts WHERE name = $1";
const SET_BALANCE: &str = "UPDATE bank_transfer_accounts SET balance_cents = $1 WHERE name = $2";
const APPLIED: &str = "SELECT id FROM bank_transfer_applied";
const BALANCES: &str = "SELECT name, balance_cents FROM bank_transfer_accounts";
const COUNTS: &str = "
    SELECT count(*), count(CASE WHEN refused = 1 THEN 1 END) FROM bank_transfer_applied";
