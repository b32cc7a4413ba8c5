//! Nested transactions: a part of the work that can fail on its own.
//!
//! ```sh
//! cargo run --example nested
//! ```
//!
//! A nested transaction may lock more, and is undone on its own: in each store it is a savepoint.
//! What it has locked is kept until the outermost transaction ends.

use palisade::{Coordinator, Error, SqlStore, Tx};
use sqlx::Sqlite;
use sqlx::sqlite::SqlitePoolOptions;

const TABLE: &str = "
    CREATE TABLE stock (item TEXT PRIMARY KEY, pieces INT NOT NULL CHECK (pieces >= 0));
    INSERT INTO stock VALUES ('pen', 5), ('ink', 1), ('paper', 0)";

#[tokio::main]
async fn main() -> Result<(), Error> {
    let pool = SqlitePoolOptions::new().max_connections(1).connect("sqlite::memory:").await?;
    sqlx::raw_sql(TABLE).execute(&pool).await?;
    let shop = SqlStore::new("shop", pool);
    shop.migrate().await?;
    let locks = palisade::connect("memory:").await?;
    let coordinator = Coordinator::builder(locks).store(&shop).build();

    // All or nothing for the pen; the rest is taken if it is there.
    let mut tx = coordinator.transaction(["stock:pen"]).begin().await?;
    take(&tx, &shop, "pen").await?;
    for extra in ["ink", "paper"] {
        let key = format!("stock:{extra}");
        let part = tx.nested([&key]).await?;
        match take(&part, &shop, extra).await {
            Ok(()) => part.commit().await?,
            Err(error) => {
                println!("without {extra}: {error}");
                part.rollback().await?;
            }
        }
    }
    println!("held to the end: {:?}", tx.held().iter().map(|held| &held.key).collect::<Vec<_>>());
    tx.commit().await?;

    let left: Vec<(String, i64)> = sqlx::query_as("SELECT item, pieces FROM stock ORDER BY item")
        .fetch_all(shop.pool())
        .await?;
    println!("left: {left:?}");
    let expected = [("ink", 0), ("paper", 0), ("pen", 4)];
    assert_eq!(left, expected.map(|(item, pieces)| (item.to_owned(), pieces)));
    Ok(())
}

/// Works in a transaction of either kind.
async fn take(tx: &Tx, shop: &SqlStore<Sqlite>, item: &str) -> Result<(), Error> {
    let db = tx.enlist(shop).await?;
    let take = "UPDATE stock SET pieces = pieces - 1 WHERE item = $1";
    sqlx::query(take).bind(item).execute(&db).await?;
    Ok(())
}
