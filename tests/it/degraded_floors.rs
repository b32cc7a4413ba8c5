//! What a switch between the locks and the fence rows knows of tokens, and where keys can be added.

use std::sync::atomic::{AtomicU32, Ordering};

use palisade::{Error, ErrorKind, Tx};
use uuid::Uuid;

use crate::degraded::{postgres, sqlite};

/// A key that a nested transaction within another would add: its fence, and where the rows are the
/// locks its lock, would be undone with the outer one.
macro_rules! keys_within_a_nested_transaction {
    ($name:ident, $bench:ident, $degraded:expr) => {
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            let b = $bench().await;
            if $degraded {
                b.redis.kill();
            }
            let request = b.coordinator.transaction(["alice"]).stores([&b.bank]);
            for undo in ["rollback", "drop", "leak"] {
                let mut tx = request.clone().begin().await.unwrap();
                assert_eq!(tx.is_degraded(), $degraded);
                let mut outer = tx.nested::<&str>([]).await.unwrap();
                let error = outer.nested(["bob", "alice"]).await.map(drop).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::WouldDeadlock, "{undo}: {error}");
                outer.nested(["alice"]).await.unwrap().commit().await.unwrap();
                match undo {
                    "rollback" => outer.rollback().await.unwrap(),
                    "drop" => drop(outer),
                    _ => std::mem::forget(outer),
                }
                assert_eq!(tx.held().len(), 1, "{undo}: bob is not held");
                drop(tx.nested(["bob"]).await.unwrap());
                let (id, db) = (tx.id(), tx.enlist(&b.bank).await.unwrap());
                let stamp = "SELECT write_tx FROM palisade_fence WHERE resource = 'bob'";
                let stamp: Option<Uuid> = sqlx::query_scalar(stamp).fetch_one(&db).await.unwrap();
                assert_eq!(stamp, Some(id), "{undo}: the outermost one has fenced it");
                tx.commit().await.unwrap();
            }
            let begun = AtomicU32::new(0);
            let work = async |mut tx: Tx| {
                begun.fetch_add(1, Ordering::Relaxed);
                let mut outer = tx.nested::<&str>([]).await?;
                outer.nested(["bob"]).await?.commit().await?;
                outer.commit().await?;
                Ok::<_, Error>(tx.held().len())
            };
            assert_eq!(request.run(work).await.unwrap(), 2);
            assert_eq!(begun.load(Ordering::Relaxed), 2, "the second time with both keys");
        }
    };
}

keys_within_a_nested_transaction!(locks_and_postgres, postgres, false);
keys_within_a_nested_transaction!(rows_of_postgres, postgres, true);
keys_within_a_nested_transaction!(locks_and_sqlite, sqlite, false);
keys_within_a_nested_transaction!(rows_of_sqlite, sqlite, true);

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_the_far_future_spoils_its_own_key_and_no_other() {
    let b = postgres().await;
    let begin = |key| b.coordinator.transaction([key]).stores([&b.bank]).begin();
    begin("alice").await.unwrap().commit().await.unwrap();
    let ahead = "UPDATE palisade_fence SET write_token = write_token + 172800000000";
    sqlx::raw_sql(ahead).execute(b.bank.pool()).await.unwrap();
    b.redis.kill();
    let tx = begin("alice").await.unwrap();
    assert!(tx.is_degraded());
    tx.commit().await.unwrap();
    b.returns().await;
    for _ in 0..2 {
        let tx = begin("bob").await.unwrap();
        assert!(!tx.is_degraded());
        tx.commit().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_are_not_there_are_above_what_the_locks_have_granted() {
    let b = postgres().await;
    let begin = |key| b.coordinator.transaction([key]).stores([&b.bank]).begin();
    let tx = begin("alice").await.unwrap();
    let before = tx.held()[0].token;
    tx.commit().await.unwrap();
    b.redis.kill();
    let tx = begin("bob").await.unwrap();
    assert!(tx.is_degraded() && tx.held()[0].token > before, "{:?} {before}", tx.held());
    tx.commit().await.unwrap();
}
