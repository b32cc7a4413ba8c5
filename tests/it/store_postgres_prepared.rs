//! The fence as a prepared statement: sessions that lack it, and keys as literals.

use palisade::store::Store;
use palisade::{ErrorKind, Mode, ResourceKey, SqlStore};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use sqlx::Postgres;
use sqlx::postgres::PgPoolOptions;

use crate::store_fences::{commit, fence, held, rolled_back, write};
use crate::store_postgres::{Bench, add, db};

/// The same database by one connection, as sessions of this kind.
async fn one_session(b: &Bench, setting: &'static str) -> SqlStore<Postgres> {
    let pool = PgPoolOptions::new().max_connections(1).after_connect(move |session, _| {
        Box::pin(async move { sqlx::raw_sql(setting).execute(session).await.map(drop) })
    });
    SqlStore::new("bank", pool.connect(&b.server.url()).await.unwrap())
}

async fn session_id(store: &SqlStore<Postgres>) -> i32 {
    sqlx::query_scalar("SELECT pg_backend_pid()").fetch_one(store.pool()).await.unwrap()
}

#[tokio::test]
async fn a_session_that_lost_its_statements_gets_them_again() {
    let b = Bench::new().await;
    let store = one_session(&b, "").await;
    for (token, sql) in [(1, "SELECT 1"), (2, "DEALLOCATE ALL"), (3, "DISCARD ALL")] {
        sqlx::raw_sql(sql).execute(store.pool()).await.unwrap();
        let branch = store.open(&write("a", token)).await.unwrap();
        add(&branch, "alice", 1).await.unwrap();
        commit(&branch).await;
        // What sqlx itself had prepared on this connection is gone too.
        let mut connection = store.pool().acquire().await.unwrap();
        sqlx::Connection::clear_cached_statements(&mut *connection).await.unwrap();
    }
}

#[tokio::test]
async fn a_commit_that_cannot_be_proven_is_rolled_back_and_its_session_closed() {
    let b = Bench::new().await;
    let store = one_session(&b, "").await;
    let before = session_id(&store).await;
    let branch = store.open(&write("a", 1)).await.unwrap();
    add(&branch, "alice", 1).await.unwrap();
    sqlx::raw_sql("DEALLOCATE ALL").execute(&db(&branch)).await.unwrap();
    let error = rolled_back(branch.commit().await);
    assert_eq!(error.kind(), ErrorKind::Conflict, "another session has the proof: {error}");
    let branch = store.open(&write("a", 2)).await.unwrap();
    let cents: i64 = sqlx::query_scalar("SELECT cents FROM account WHERE name = 'alice'")
        .fetch_one(&db(&branch))
        .await
        .unwrap();
    assert_eq!(cents, 100);
    commit(&branch).await;
    assert_ne!(session_id(&store).await, before);
}

#[tokio::test]
async fn a_limit_holds_for_what_follows_it_in_the_same_message() {
    let b = Bench::new().await;
    let sql = "BEGIN; SET LOCAL statement_timeout = 50; SELECT pg_sleep(600)";
    let error = sqlx::raw_sql(sql).execute(one_session(&b, "").await.pool()).await.unwrap_err();
    assert_eq!(error.as_database_error().unwrap().code().as_deref(), Some("57014"));
}

#[tokio::test]
async fn a_store_without_tables_is_told_so_and_its_session_works_once_they_are_there() {
    let b = Bench::new().await;
    let store = one_session(&b, "").await;
    b.sql("ALTER TABLE palisade_fence RENAME TO elsewhere").await;
    let error = store.open(&write("a", 1)).await.map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotMigrated, "{error:?}");
    b.sql("ALTER TABLE elsewhere RENAME TO palisade_fence").await;
    commit(&store.open(&write("a", 1)).await.unwrap()).await;
}

/// Keys that are made of what literals, arrays and escapes are made of, and of anything.
fn keys() -> impl Strategy<Value = Vec<String>> {
    let key = "[a-z'\\\\\"{},$NUL0xu27\n\r\t;-]{1,12}|\\PC{1,12}|NULL";
    proptest::collection::btree_set(key, 1..8).prop_map(|keys| keys.into_iter().collect())
}

/// Fences random keys, and compares what is in the table then.
async fn keys_are_fenced_as_they_are(setting: &'static str) {
    const SEED: u64 = 0x5eed;
    println!("seed {SEED:#x}");
    let b = Bench::new().await;
    let store = one_session(&b, setting).await;
    let seed: Vec<u8> = SEED.to_le_bytes().repeat(4);
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    for token in 1..=100 {
        let keys = keys().new_tree(&mut runner).unwrap().current();
        let rows = keys.iter().map(|key| held(key, Mode::Exclusive, token)).collect::<Vec<_>>();
        let branch = store.open(&fence(rows.clone())).await.unwrap();
        let newest = "SELECT resource FROM palisade_fence WHERE write_token = $1 ORDER BY 1";
        let token = i64::try_from(token).unwrap();
        let seen: Vec<String> =
            sqlx::query_scalar(newest).bind(token).fetch_all(&db(&branch)).await.unwrap();
        assert_eq!(seen, keys, "with {setting:?}");
        commit(&branch).await;
        // A refusal names a key, so what passed comes back as it went there.
        let mut mixed = rows;
        let free = ResourceKey::parse(format!("{}~", keys[0])).unwrap();
        mixed.push(palisade::store::Held { key: free.clone(), ..mixed[0].clone() });
        let error = store.open(&fence(mixed)).await.map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StaleToken);
        assert_ne!(error.key(), Some(&free));
    }
}

#[tokio::test]
async fn keys_of_any_kind_are_literals_that_mean_themselves() {
    keys_are_fenced_as_they_are("").await;
}

#[tokio::test]
async fn keys_mean_themselves_where_strings_do_not_conform() {
    keys_are_fenced_as_they_are("SET standard_conforming_strings = off").await;
}
