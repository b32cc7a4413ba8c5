//! Facts about PostgreSQL that the design of the fence leans on, and what palisade makes of each.
//! The first part of a test shows the fact with plain SQL, where there is one to show.

use std::time::Duration;

use futures_util::StreamExt;
use palisade::store::{Isolation, Store};
use palisade::{ErrorKind, Mode};
use sqlx::{Connection, PgConnection};
use tokio::time::{Instant, sleep, timeout};

use crate::store_fences::{
    again, commit, degraded, fence, held, in_doubt, rolled_back, share, with_lease, with_wait,
    write,
};
use crate::store_postgres::{Bench, add, db};
use crate::support::wait_until;

const SOON: Duration = Duration::from_secs(10);

async fn connection(b: &Bench) -> PgConnection {
    PgConnection::connect(&b.server.url()).await.unwrap()
}

async fn run(connection: &mut PgConnection, sql: &'static str) {
    sqlx::raw_sql(sql).execute(connection).await.unwrap();
}

/// Whether a session waits for a lock.
async fn is_blocked(observer: &mut PgConnection) -> bool {
    number(observer, "SELECT count(*) FROM pg_locks WHERE NOT granted").await > 0
}

async fn number(connection: &mut PgConnection, sql: &'static str) -> i64 {
    sqlx::query_scalar(sql).fetch_one(connection).await.unwrap()
}

const ALICE: &str = "SELECT cents FROM account WHERE name = 'alice'";

/// Two plain transactions add 1 to what they read; the second begins while the first is open, and
/// `fence` is what each does about its fence, before or after.
async fn lose_an_update(b: &Bench, begin: &'static str, fence_first: bool, fence: &'static str) {
    let (mut first, mut second) = (connection(b).await, connection(b).await);
    run(&mut first, begin).await;
    run(&mut second, begin).await;
    if fence_first {
        run(&mut first, fence).await;
    }
    let seen = number(&mut first, ALICE).await;
    let late = tokio::spawn(async move {
        if fence_first {
            run(&mut second, fence).await;
        }
        let seen = number(&mut second, ALICE).await;
        if !fence_first {
            run(&mut second, fence).await;
        }
        let set = "UPDATE account SET cents = $1 WHERE name = 'alice'";
        let set = sqlx::query(set).bind(seen + 1).execute(&mut second).await;
        if set.is_ok() {
            run(&mut second, "COMMIT").await;
        }
    });
    if !fence_first {
        run(&mut first, fence).await;
    }
    // It waits for the fence row, having read before it or not.
    let mut observer = connection(b).await;
    let stands = async || late.is_finished() || is_blocked(&mut observer).await;
    wait_until("the second one waits, or has nothing to wait for", SOON, stands).await;
    let set = "UPDATE account SET cents = $1 WHERE name = 'alice'";
    sqlx::query(set).bind(seen + 1).execute(&mut first).await.unwrap();
    run(&mut first, "COMMIT").await;
    let _ = late.await;
}

const TOUCH: &str = "UPDATE palisade_fence SET touched = touched + 1 WHERE resource = 'alice'";

#[tokio::test]
async fn a_fence_touched_last_loses_updates_at_read_committed_and_touched_first_does_not() {
    let b = Bench::new().await;
    commit(&b.open(&write("alice", 1)).await).await;
    lose_an_update(&b, "BEGIN", false, TOUCH).await;
    let mut observer = connection(&b).await;
    assert_eq!(number(&mut observer, ALICE).await, 101, "one of two was lost");
    lose_an_update(&b, "BEGIN", true, TOUCH).await;
    assert_eq!(number(&mut observer, ALICE).await, 103, "both are there");
}

#[tokio::test]
async fn a_fence_that_is_only_locked_hands_out_a_stale_snapshot_where_a_changed_one_fails() {
    let b = Bench::new().await;
    commit(&b.open(&write("alice", 1)).await).await;
    let mut observer = connection(&b).await;
    let begin = "BEGIN ISOLATION LEVEL REPEATABLE READ";
    let lock = "SELECT 1 FROM palisade_fence WHERE resource = 'alice' FOR UPDATE";
    // What is read behind the lock is as old as the wait for it, and no error says so.
    let (mut first, mut second) = (connection(&b).await, connection(&b).await);
    run(&mut first, begin).await;
    run(&mut first, lock).await;
    run(&mut second, begin).await;
    let waiting = tokio::spawn(async move {
        run(&mut second, lock).await;
        number(&mut second, ALICE).await
    });
    wait_until("it waits", SOON, async || is_blocked(&mut observer).await).await;
    run(&mut first, "UPDATE account SET cents = 500 WHERE name = 'alice'; COMMIT").await;
    assert_eq!(waiting.await.unwrap(), 100);
    assert_eq!(number(&mut observer, ALICE).await, 500);
    // The branch's own fence starts over within its deadline, and reads what is there.
    let store = b.store.clone().isolation(Isolation::RepeatableRead);
    let first = store.open(&write("alice", 2)).await.unwrap();
    add(&first, "alice", 1).await.unwrap();
    let later = write("alice", 3);
    let second = store.open(&later);
    let (second, ()) = tokio::join!(second, async {
        wait_until("it waits", SOON, async || is_blocked(&mut observer).await).await;
        commit(&first).await;
    });
    let second = second.unwrap();
    let seen: i64 = sqlx::query_scalar(ALICE).fetch_one(&db(&second)).await.unwrap();
    assert_eq!(seen, 501);
    commit(&second).await;
}

#[tokio::test]
async fn a_duplicate_token_of_another_owner_is_refused() {
    let b = Bench::new().await;
    let mine = write("a", 20);
    commit(&b.open(&mine).await).await;
    assert_eq!(b.refusal(&write("a", 20)).await.kind(), ErrorKind::StaleToken);
    commit(&b.open(&again(&mine)).await).await;
    let reader = fence(vec![held("a", Mode::Shared, 20), held("x", Mode::Exclusive, 20)]);
    assert_eq!(b.refusal(&reader).await.key().unwrap().as_str(), "a");
}

#[tokio::test]
async fn a_shared_token_refuses_writers_below_it_and_passes_beside_others() {
    let b = Bench::new().await;
    let reading = fence(vec![held("a", Mode::Exclusive, 20), held("rates", Mode::Shared, 20)]);
    commit(&b.open(&reading).await).await;
    let older = fence(vec![held("b", Mode::Exclusive, 15), held("rates", Mode::Shared, 15)]);
    commit(&b.open(&older).await).await;
    assert_eq!(b.refusal(&write("rates", 20)).await.kind(), ErrorKind::StaleToken);
    assert_eq!(b.refusal(&write("rates", 15)).await.floor().unwrap().get(), 20);
    commit(&b.open(&write("rates", 21)).await).await;
    let late = fence(vec![held("c", Mode::Exclusive, 21), held("rates", Mode::Shared, 20)]);
    assert_eq!(b.refusal(&late).await.key().unwrap().as_str(), "rates");
}

#[tokio::test]
async fn shared_readers_do_not_stand_in_line_and_read_one_snapshot() {
    let b = Bench::new().await;
    let first = b.store.open_read(&share("a", 10)).await.unwrap();
    let second = b.store.open_read(&share("a", 12)).await.unwrap();
    let writer = b.open(&write("b", 20)).await;
    add(&writer, "alice", 5).await.unwrap();
    commit(&writer).await;
    for branch in [&first, &second] {
        let seen: i64 = sqlx::query_scalar(ALICE).fetch_one(&db(branch)).await.unwrap();
        assert_eq!(seen, 100);
    }
    assert!(add(&first, "alice", 5).await.is_err(), "it cannot write");
    first.rollback().await.unwrap();
    commit(&second).await;
    assert_eq!(b.refusal(&write("a", 11)).await.floor().unwrap().get(), 12);
}

#[tokio::test]
async fn a_reading_branch_that_was_overtaken_is_refused_and_one_behind_its_own_write_passes() {
    let b = Bench::new().await;
    let mine = write("a", 20);
    b.store.open_read(&mine).await.unwrap().rollback().await.unwrap();
    commit(&b.open(&again(&mine)).await).await;
    b.store.open_read(&again(&mine)).await.unwrap().rollback().await.unwrap();
    for stale in [write("a", 19), share("a", 19), write("a", 20), share("a", 20)] {
        let error = b.store.open_read(&stale).await.map(drop).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StaleToken);
        assert_eq!(error.floor().unwrap().get(), 20);
    }
}

#[tokio::test]
async fn commit_in_a_failed_transaction_answers_rollback_without_an_error() {
    let b = Bench::new().await;
    let mut plain = connection(&b).await;
    run(&mut plain, "BEGIN; UPDATE account SET cents = 0").await;
    sqlx::raw_sql("SELECT 1 / 0").execute(&mut plain).await.unwrap_err();
    run(&mut plain, "COMMIT").await;
    assert_eq!(number(&mut plain, ALICE).await, 100, "nothing was committed, and nobody said so");
    // The branch never hears of this failure: it comes behind the last row that anybody reads.
    let branch = b.open(&write("a", 10)).await;
    add(&branch, "alice", 5).await.unwrap();
    let handle = db(&branch);
    let mut rows = sqlx::raw_sql("SELECT 1; SELECT pg_sleep(0.1); SELECT 1 / 0").fetch(&handle);
    rows.next().await.unwrap().unwrap();
    drop(rows);
    assert!(branch.failure().is_none());
    rolled_back(branch.commit().await);
    assert_eq!(number(&mut plain, ALICE).await, 100);
}

#[tokio::test]
async fn a_users_own_commit_or_rollback_through_the_branch_is_found_out() {
    let b = Bench::new().await;
    let mut token = 10;
    for sql in ["COMMIT", "ROLLBACK", "COMMIT; BEGIN", "ROLLBACK; BEGIN"] {
        for commits in [true, false] {
            token += 10;
            let branch = b.open(&write("a", token)).await;
            sqlx::raw_sql(sql).execute(&db(&branch)).await.unwrap();
            add(&branch, "alice", 1).await.unwrap();
            if commits {
                assert!(in_doubt(branch.commit().await).transaction().is_some());
            } else {
                assert!(branch.rollback().await.unwrap_err().is_in_doubt(), "{sql}");
            }
        }
    }
    token += 10;
    let branch = b.open(&write("a", token)).await;
    sqlx::raw_sql("COMMIT; BEGIN").execute(&db(&branch)).await.unwrap();
    sqlx::raw_sql("SELECT 1 / 0").execute(&db(&branch)).await.unwrap_err();
    in_doubt(branch.commit().await);
}

#[tokio::test]
async fn a_stopped_client_keeps_its_rows_only_for_one_lease() {
    let b = Bench::new().await;
    let lease = Duration::from_millis(500);
    let keys = |own, token| {
        fence(vec![held(own, Mode::Exclusive, token), held("rates", Mode::Shared, token)])
    };
    // Both hold `rates` shared, so neither may end the other: only time does.
    let stopped = b.open(&with_lease(keys("a", 10), lease)).await;
    let started = Instant::now();
    let next = b.open(&keys("b", 20)).await;
    let waited = started.elapsed();
    assert!(waited >= lease / 2 && waited < lease * 4, "{waited:?}");
    commit(&next).await;
    let error = palisade::Error::from(add(&stopped, "alice", 1).await.unwrap_err());
    assert_eq!(error.kind(), palisade::ErrorKind::Conflict, "{error:?}");
}

#[tokio::test]
async fn a_branch_that_is_pinged_may_think_longer_than_its_lease() {
    let b = Bench::new().await;
    let branch = b.open(&with_lease(write("a", 10), Duration::from_secs(2))).await;
    for _ in 0..8 {
        sleep(Duration::from_millis(400)).await;
        branch.ping().await.unwrap();
    }
    add(&branch, "alice", 1).await.unwrap();
    commit(&branch).await;
}

#[tokio::test]
async fn a_stale_session_is_ended_on_contact() {
    let b = Bench::new().await;
    let stopped = b.open(&write("a", 10)).await;
    add(&stopped, "alice", 1000).await.unwrap();
    let started = Instant::now();
    let next = b.open(&write("a", 20)).await;
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    add(&next, "alice", 1).await.unwrap();
    commit(&next).await;
    assert!(add(&stopped, "alice", 1).await.is_err());
    drop(stopped);
    let mut observer = connection(&b).await;
    assert_eq!(number(&mut observer, ALICE).await, 101);
}

#[tokio::test]
async fn a_newer_session_and_a_shared_one_are_waited_for() {
    let b = Bench::new().await;
    let newer = b.open(&write("a", 20)).await;
    let error = b.refusal(&with_wait(write("a", 10), Duration::from_millis(400))).await;
    assert_eq!(error.kind(), ErrorKind::Conflict);
    commit(&newer).await;
    let keys = |own, token| {
        fence(vec![held(own, Mode::Exclusive, token), held("rates", Mode::Shared, token)])
    };
    let first = b.open(&keys("x", 30)).await;
    let error = b.refusal(&with_wait(keys("y", 40), Duration::from_millis(400))).await;
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    commit(&first).await;
}

#[tokio::test]
async fn what_a_branch_holds_is_seen_whether_it_is_in_a_name_or_in_a_row() {
    let b = Bench::new().await;
    let keys = |names: &[&str], token| {
        fence(names.iter().map(|name| held(name, Mode::Exclusive, token)).collect())
    };
    let published = "SELECT count(*) FROM palisade_branch";
    let mut observer = connection(&b).await;
    for (at, names) in [&["a"][..], &["a", "b", "c"], &["a", "b", "c", "d"]].iter().enumerate() {
        let token = 10 * (u64::try_from(at).unwrap() + 1);
        let overtaken = b.open(&keys(names, token)).await;
        assert_eq!(number(&mut observer, published).await, i64::from(names.len() > 3));
        let last = names.last().unwrap();
        let begun = Instant::now();
        commit(&b.open(&write(last, token + 5)).await).await;
        assert!(begun.elapsed() < Duration::from_secs(3), "its session was ended");
        let outcome = overtaken.commit().await;
        assert!(!matches!(outcome, palisade::store::Outcome::Committed), "{outcome:?}");
        // A branch with other keys is in nobody's way, whatever its token.
        let apart = b.open(&keys(&["x", "y"], token)).await;
        commit(&b.open(&write(last, token + 6)).await).await;
        commit(&apart).await;
    }
}

#[tokio::test]
async fn a_branch_on_another_fence_of_the_same_server_is_left_alone() {
    let b = Bench::new().await;
    b.sql("CREATE SCHEMA apart").await;
    let database = b.server.create_database("elsewhere");
    let schema = format!("{}?options=-csearch_path%3Dapart", b.server.url());
    let mut bystanders = Vec::new();
    for url in [database, schema] {
        let pool = sqlx::postgres::PgPoolOptions::new().max_connections(2).connect(&url).await;
        let store = palisade::SqlStore::new("elsewhere", pool.unwrap());
        store.migrate().await.unwrap();
        bystanders.push(store.open(&write("a", 10)).await.unwrap());
    }
    let overtaken = b.open(&write("a", 11)).await;
    commit(&b.open(&write("a", 20)).await).await;
    let outcome = overtaken.commit().await;
    assert!(!matches!(outcome, palisade::store::Outcome::Committed), "{outcome:?}");
    for bystander in &bystanders {
        commit(bystander).await;
    }
}

#[tokio::test]
async fn a_session_that_went_on_to_other_work_is_left_alone() {
    let b = Bench::new().await;
    let pool = sqlx::postgres::PgPoolOptions::new().max_connections(1);
    let pool = pool.connect(&b.server.url()).await.unwrap();
    let store = palisade::SqlStore::new("bank", pool.clone());
    // Two tokens do not fit into the name of a session: they are written into a row, which stays.
    let two = fence(vec![held("a", Mode::Exclusive, 10), held("b", Mode::Exclusive, 11)]);
    commit(&store.open(&two).await.unwrap()).await;
    // The same session, as it is published, now locks the row outside of any branch.
    let mut other = pool.acquire().await.unwrap();
    let published = "SELECT count(*) FROM palisade_branch WHERE pid = pg_backend_pid()";
    assert_eq!(number(&mut other, published).await, 1);
    run(&mut other, "BEGIN; UPDATE palisade_fence SET touched = touched + 1").await;
    let error = b.refusal(&with_wait(write("a", 20), Duration::from_millis(400))).await;
    assert_eq!(error.kind(), ErrorKind::Conflict);
    run(&mut other, "COMMIT").await;
}

#[tokio::test]
async fn an_owner_that_would_wait_for_itself_is_told_at_once() {
    let b = Bench::new().await;
    let mine = write("a", 10);
    let branch = b.open(&mine).await;
    let started = Instant::now();
    let error = b.refusal(&with_wait(again(&mine), SOON)).await;
    assert_eq!(error.kind(), ErrorKind::Misuse);
    assert_eq!(error.key().unwrap().as_str(), "a");
    assert!(started.elapsed() < Duration::from_secs(2));
    commit(&branch).await;
}

#[tokio::test]
async fn further_keys_are_fenced_at_read_committed_and_refused_at_one_snapshot() {
    let b = Bench::new().await;
    commit(&b.open(&write("stale", 30)).await).await;
    let branch = b.open(&write("m", 20)).await;
    let error = branch.extend(&[held("stale", Mode::Exclusive, 20)]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::StaleToken);
    wait_until("a connection is free", SOON, async || b.store.pool().num_idle() > 0).await;
    branch.extend(&[held("c", Mode::Exclusive, 20), held("d", Mode::Shared, 20)]).await.unwrap();
    branch.savepoint(1).await.unwrap();
    branch.rollback_to_savepoint(1).await.unwrap();
    // What was fenced before a savepoint is still held after it.
    let error = b.refusal(&with_wait(write("c", 10), Duration::from_millis(300))).await;
    assert_eq!(error.kind(), ErrorKind::Conflict);
    // And the added keys are published, so a newer holder of one ends the session.
    let next = b.open(&write("d", 40)).await;
    commit(&next).await;
    assert!(add(&branch, "alice", 1).await.is_err());

    for isolation in [Isolation::RepeatableRead, Isolation::Serializable] {
        let store = b.store.clone().isolation(isolation);
        let branch = store.open(&write("e", 50)).await.unwrap();
        let error = branch.extend(&[held("f", Mode::Shared, 50)]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldDeadlock);
        assert_eq!(error.declare()[0].key.as_str(), "f");
        branch.rollback().await.unwrap();
    }
}

#[tokio::test]
async fn added_keys_that_are_taken_are_waited_for_shortly_and_leave_the_branch_as_it_was() {
    let b = Bench::new().await;
    let newer = b.open(&write("busy", 50)).await;
    let old = b.open(&write("old", 10)).await;
    let branch = b.open(&write("m", 20)).await;
    let error = branch.extend(&[held("busy", Mode::Exclusive, 20)]).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(branch.failure().is_none());
    branch.extend(&[held("old", Mode::Exclusive, 20)]).await.unwrap();
    assert!(add(&old, "alice", 1).await.is_err(), "its session was in the way, and over");
    add(&branch, "alice", 1).await.unwrap();
    commit(&branch).await;
    commit(&newer).await;
}

#[tokio::test]
async fn purged_rows_refuse_old_tokens() {
    let b = Bench::new().await;
    commit(&b.open(&write("old", 10)).await).await;
    commit(&b.open(&write("new", 50)).await).await;
    b.sql("UPDATE palisade_fence SET touched = 0 WHERE resource = 'old'").await;
    let hour = Duration::from_secs(3600);
    let first = b.store.purge(hour).await.unwrap();
    assert_eq!((first.rows, first.watermark), (0, 10), "nothing below a mark of its own round");
    let second = b.store.purge(hour).await.unwrap();
    assert_eq!(second.rows, 0, "not before the grace is over");
    b.sql("UPDATE palisade_watermark SET advanced = advanced - 60000000").await;
    let third = b.store.purge(hour).await.unwrap();
    assert_eq!((third.rows, third.watermark), (1, 10));
    let error = b.refusal(&write("old", 10)).await;
    assert_eq!(error.kind(), ErrorKind::StaleToken);
    assert_eq!(error.floor().unwrap().get(), 10, "the watermark");
    commit(&b.open(&write("old", 11)).await).await;
}

#[tokio::test]
async fn a_purge_passes_over_a_row_that_a_branch_has_taken() {
    let b = Bench::new().await;
    commit(&b.open(&write("a", 10)).await).await;
    b.sql("UPDATE palisade_fence SET touched = 0").await;
    b.store.purge(Duration::from_secs(60)).await.unwrap();
    b.sql("UPDATE palisade_watermark SET advanced = 1").await;
    let branch = b.open(&write("a", 20)).await;
    let purged = timeout(SOON, b.store.purge(Duration::from_secs(60))).await.unwrap().unwrap();
    assert_eq!(purged.rows, 0);
    commit(&branch).await;
    assert_eq!(b.refusal(&write("a", 19)).await.floor().unwrap().get(), 20);
}

#[tokio::test]
async fn a_purge_forgets_sessions_that_are_gone() {
    let b = Bench::new().await;
    let two = fence(vec![held("a", Mode::Exclusive, 10), held("b", Mode::Exclusive, 11)]);
    commit(&b.open(&two).await).await;
    b.sql(
        "INSERT INTO palisade_branch VALUES (1, now(), gen_random_uuid(), gen_random_uuid(),
         '{}', '{}', '{}')",
    )
    .await;
    b.store.purge(Duration::ZERO).await.unwrap();
    let left = "SELECT count(*) FROM palisade_branch WHERE pid = 1";
    let all = "SELECT count(*) FROM palisade_branch";
    let mut observer = connection(&b).await;
    assert_eq!(number(&mut observer, left).await, 0);
    assert_eq!(number(&mut observer, all).await, 1, "that of the living one is kept");
}

#[tokio::test]
async fn an_acknowledged_commit_is_durable_whatever_the_database_defaults_to() {
    let b = Bench::new().await;
    b.sql("ALTER ROLE postgres SET synchronous_commit = off").await;
    b.store.pool().close().await;
    let pool = sqlx::PgPool::connect(&b.server.url()).await.unwrap();
    let store = palisade::SqlStore::new("bank", pool);
    let branch = store.open(&write("a", 10)).await.unwrap();
    let show = "SELECT current_setting('synchronous_commit')";
    let setting: String = sqlx::query_scalar(show).fetch_one(&db(&branch)).await.unwrap();
    assert_eq!(setting, "on");
    commit(&branch).await;
}

#[tokio::test]
async fn branches_that_take_the_same_keys_in_any_order_never_deadlock() {
    let b = Bench::new().await;
    let next = std::sync::atomic::AtomicU64::new(1);
    let one = async || {
        for _ in 0..20 {
            let token = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let keys = ["c", "a", "b"].map(|key| held(key, Mode::Exclusive, token));
            if let Ok(branch) = b.store.open(&fence(keys.to_vec())).await {
                let _ = branch.commit().await;
            }
        }
    };
    timeout(SOON, async { tokio::join!(one(), one(), one()) }).await.unwrap();
    let open = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'";
    let mut observer = connection(&b).await;
    wait_until("all is over", SOON, async || number(&mut observer, open).await == 0).await;
}

#[tokio::test]
async fn a_statement_that_is_kept_and_not_polled_does_not_hold_up_a_commit_for_ever() {
    let b = Bench::new().await;
    let branch =
        b.store.open(&with_lease(write("a", 1), Duration::from_millis(300))).await.unwrap();
    let handle = db(&branch);
    let mut kept = Box::pin(sqlx::query("SELECT pg_sleep(0.01)").execute(&handle));
    assert!(futures_util::poll!(kept.as_mut()).is_pending());
    let outcome = timeout(SOON * 3, branch.commit()).await;
    let error = rolled_back(outcome.expect("the commit waits for a lease at the longest"));
    assert_eq!(error.kind(), ErrorKind::Aborted, "{error}");
    drop(kept);
    commit(&b.store.open(&write("a", 2)).await.unwrap()).await;
}

#[tokio::test]
async fn a_client_that_stops_reading_does_not_keep_its_rows_for_ever() {
    const LARGE: &str = "SELECT repeat('x', 1000) FROM generate_series(1, 10000000)";
    let second = Duration::from_secs(1);
    for holder in [write("a", 1), degraded(vec![held("a", Mode::Exclusive, 1)])] {
        let (b, issuer) = (Bench::new().await, holder.issuer);
        let branch = b.store.open(&with_wait(with_lease(holder, second), SOON)).await.unwrap();
        let handle = db(&branch);
        let mut stream = sqlx::query(LARGE).fetch(&handle);
        stream.next().await.unwrap().unwrap();
        let mut observer = connection(&b).await;
        let unread = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'ClientWrite'";
        wait_until("the server cannot write", SOON * 3, async || {
            number(&mut observer, unread).await == 1
        })
        .await;
        // It has no token that would end anybody's time.
        let other = degraded(vec![held("a", Mode::Exclusive, 1)]);
        let other = b.store.open(&with_wait(other, SOON * 6)).await;
        commit(&other.unwrap_or_else(|error| panic!("{issuer:?}: {error}"))).await;
    }
}
