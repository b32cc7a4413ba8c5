//! Shared readers: many read the rates at once, and a writer is alone with them.
//!
//! ```sh
//! cargo run --example shared_readers
//! ```
//!
//! A key that is named as shared may be held by any number of transactions that also share it. A
//! branch that only reads sees one snapshot in which nothing is newer than its own token.

use palisade::{Coordinator, Error, SqlStore, Transaction};
use sqlx::Sqlite;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool};

const NONE: [&str; 0] = [];

#[tokio::main]
async fn main() -> Result<(), Error> {
    // A file, because a database in memory has one connection, and here are several readers.
    let directory = tempfile::tempdir().expect("a temporary directory");
    let file = SqliteConnectOptions::new().filename(directory.path().join("rates.db"));
    let file = file.create_if_missing(true).journal_mode(SqliteJournalMode::Wal);
    let rates = SqlStore::new("rates", SqlitePool::connect_with(file).await?);
    let table = "CREATE TABLE rate (cents INT NOT NULL); INSERT INTO rate VALUES (108)";
    sqlx::raw_sql(table).execute(rates.pool()).await?;
    rates.migrate().await?;
    let locks = palisade::connect("memory:").await?;
    let coordinator = Coordinator::builder(locks.clone()).store(&rates).build();

    let one = coordinator.transaction(NONE).shared(["rates"]).begin().await?;
    let other = coordinator.transaction(NONE).shared(["rates"]).begin().await?;
    println!("{} hold the rates", locks.inspect("rates").await?.holders.len());
    println!("both read {} and {}", read(&one, &rates).await?, read(&other, &rates).await?);

    // A writer waits until both are through, and those who come later wait behind the writer.
    let writer = tokio::spawn(raise(coordinator.clone(), rates.clone()));
    while locks.inspect("rates").await?.waiters.is_empty() {
        tokio::task::yield_now().await;
    }
    let third = tokio::spawn(coordinator.transaction(NONE).shared(["rates"]).begin());
    while locks.inspect("rates").await?.waiters.len() < 2 {
        tokio::task::yield_now().await;
    }
    assert_eq!(read(&one, &rates).await?, 108, "nothing changes under a reader");
    one.commit().await?;
    other.commit().await?;

    writer.await.expect("the task does not panic")?;
    let third = third.await.expect("the task does not panic")?;
    let cents = read(&third, &rates).await?;
    println!("who came after the writer reads {cents}");
    assert_eq!(cents, 109);
    third.commit().await
}

async fn read(tx: &Transaction, rates: &SqlStore<Sqlite>) -> Result<i64, Error> {
    let db = tx.read(rates).await?;
    Ok(sqlx::query_scalar("SELECT cents FROM rate").fetch_one(&db).await?)
}

async fn raise(coordinator: Coordinator, rates: SqlStore<Sqlite>) -> Result<(), Error> {
    let work = async |tx: palisade::Tx| {
        let db = tx.enlist(&rates).await?;
        sqlx::query("UPDATE rate SET cents = cents + 1").execute(&db).await?;
        Ok(())
    };
    coordinator.run(["rates"], work).await
}
