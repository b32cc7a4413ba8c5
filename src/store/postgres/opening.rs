//! Opening a branch: publish, begin, fence, and only then hand it out.

use std::time::Duration;

use sqlx::Postgres;
use tokio::time::Instant;

use crate::error::{Error, ErrorKind, Result};
use crate::sql::postgres::prepared::{LACKING, Prepared};
use crate::sql::postgres::{begin, begin_read, name, publish, savepoint};
use crate::sql::{FENCE_TIMEOUT, classify, refuse, sqlstate};
use crate::types::Want;

use super::super::database::Opened;
use super::super::session::Session;
use super::super::sql_store::SqlStore;
use super::super::verdict::{Fenced, overtaken};
use super::super::{Fence, Held};
use super::contact::{contact, is_blocked, publish_more};
use super::fence::{Taken, published, refusal, take, tokens};
use super::{Facts, run};

/// How long one fence statement waits for a row, before somebody looks who is in the way.
const LOCK_TIMEOUT: Duration = Duration::from_millis(150);

/// How long keys that are added to an open branch are waited for. Short, because others may wait
/// for rows that this branch has.
const EXTEND_PATIENCE: Duration = Duration::from_secs(1);

/// Opens a branch that may write: one round trip when nobody is in the way.
pub(super) async fn open(store: &SqlStore<Postgres>, fence: &Fence) -> Result<Opened<Postgres>> {
    let (session, taken) = pass(store, fence, false).await?;
    let mut facts =
        Facts { fenced: Fenced::default(), id: Some(taken.id), extends: taken.read_committed };
    facts.fenced.add(&fence.held, &taken.passed);
    Ok(Opened { session, facts })
}

/// Opens a branch that reads one snapshot: three round trips.
pub(super) async fn open_read(
    store: &SqlStore<Postgres>,
    fence: &Fence,
) -> Result<Opened<Postgres>> {
    let (mut session, _) = pass(store, fence, true).await?;
    let snapshot = begin_read(fence.attempt, store.limit(), fence.lease.get());
    run(session.conn()?, snapshot).await.map_err(|error| classify("fence", error))?;
    let rows = tokens(session.conn()?, &fence.held).await;
    let rows = rows.map_err(|error| classify("fence", error))?;
    match overtaken(fence, &rows) {
        Some(error) => Err(end_refused(session, error).await),
        None => {
            let facts = Facts { fenced: Fenced::default(), id: None, extends: false };
            Ok(Opened { session, facts })
        }
    }
}

/// Begins and takes the fence rows, until the deadline.
async fn pass(
    store: &SqlStore<Postgres>,
    fence: &Fence,
    reads: bool,
) -> Result<(Session<Postgres>, Taken)> {
    let conn = store.acquire("fence", fence.deadline).await?;
    // From here on the connection is guarded: what is sent next may or may not begin a transaction.
    let mut session = Session::new(conn, ());
    let attempt = (!reads).then_some(fence.attempt);
    let isolation = if reads { "ISOLATION LEVEL READ COMMITTED" } else { store.settings.sql() };
    let branch = published(fence);
    let (name, mut message) = match name::full(&branch) {
        Some(name) => (name, String::new()),
        None => (name::start(fence.attempt), publish(&branch)),
    };
    let mut prepared = false;
    loop {
        let left = fence.deadline.saturating_duration_since(Instant::now());
        let lock = LOCK_TIMEOUT.min(left);
        message += &begin(&name, isolation, lock, FENCE_TIMEOUT, fence.lease.get());
        let before = std::mem::take(&mut message);
        match take(session.conn()?, store, fence, &fence.held, attempt, before).await {
            Ok(taken) if taken.passed.len() == fence.held.len() => return Ok((session, taken)),
            Ok(taken) => {
                let error = refusal(session.conn()?, &fence.held, &taken).await;
                let error = error.unwrap_or_else(|error| classify("fence", error));
                return Err(end_refused(session, error).await);
            }
            Err(error) if !prepared && sqlstate(&error) == LACKING => {
                message = Prepared::of(store.fence).prepare();
                prepared = true;
            }
            Err(error) if is_blocked(&error) => {
                run(session.conn()?, "ROLLBACK").await.map_err(|e| classify("fence", e))?;
                if let Err(refused) = meet(&mut session, fence, error).await {
                    return Err(end_refused(session, refused).await);
                }
            }
            Err(error) => return Err(end_refused(session, classify("fence", error)).await),
        }
    }
}

/// Somebody was in the way: ends it if its time is over, and says whether to try again.
async fn meet(session: &mut Session<Postgres>, fence: &Fence, error: sqlx::Error) -> Result<()> {
    let waited = matches!(&*sqlstate(&error), "55P03" | "57014");
    if waited {
        contact(session.conn()?, fence, &fence.held).await?;
    }
    if Instant::now() >= fence.deadline || !fence.state.is_held() {
        return Err(blocked().with_source(error));
    }
    Ok(())
}

fn blocked() -> Error {
    let detail = "another branch has the rows of these keys, and did not end in time";
    Error::new(ErrorKind::Conflict, "fence", detail)
}

/// Ends a transaction whose fence refused it. A connection that does not confirm it is closed.
async fn end_refused(mut session: Session<Postgres>, error: Error) -> Error {
    let ended = match session.conn() {
        Ok(conn) => run(conn, "ROLLBACK").await.is_ok(),
        Err(_) => false,
    };
    if ended {
        session.release();
    }
    error
}

/// Fences further keys in the open transaction, within a savepoint of its own, so that a refusal
/// leaves the transaction as it was.
pub(super) async fn extend(
    store: &SqlStore<Postgres>,
    fence: &Fence,
    open: &mut Opened<Postgres>,
    held: &[Held],
) -> Result<Result<()>, sqlx::Error> {
    let missing = open.facts.fenced.missing(held);
    if missing.is_empty() {
        return Ok(Ok(()));
    }
    if !open.facts.extends {
        let wants = missing.iter().map(|held| Want::new(held.key.clone(), held.mode)).collect();
        let detail = "a branch that sees one snapshot cannot take further keys; declare them when \
                      the transaction begins";
        let error = Error::new(ErrorKind::WouldDeadlock, "fence", detail).with_declare(wants);
        return Ok(Err(error));
    }
    publish_more(store, fence, &missing).await;
    let conn = open.session.conn().map_err(refuse)?;
    let deadline = Instant::now() + EXTEND_PATIENCE.min(fence.lease.get());
    loop {
        let before = savepoint(LOCK_TIMEOUT, FENCE_TIMEOUT);
        let refused = match take(conn, store, fence, &missing, Some(fence.attempt), before).await {
            Ok(taken) if taken.passed.len() == missing.len() => {
                run(conn, "RELEASE SAVEPOINT palisade_extend").await?;
                open.facts.fenced.add(&missing, &taken.passed);
                return Ok(Ok(()));
            }
            Ok(taken) => Some(refusal(conn, &missing, &taken).await?),
            Err(error) if is_blocked(&error) && Instant::now() < deadline => None,
            Err(error) if is_blocked(&error) => Some(blocked().with_source(error)),
            Err(error) => return Err(error),
        };
        // Who is in the way is asked anew, so what this transaction has seen of others is dropped.
        let undo = "ROLLBACK TO SAVEPOINT palisade_extend; RELEASE SAVEPOINT palisade_extend; \
                    SELECT pg_stat_clear_snapshot()";
        run(conn, undo).await?;
        if let Some(error) = refused {
            return Ok(Err(error));
        }
        if let Err(error) = contact(conn, fence, &missing).await {
            return match error.kind() {
                ErrorKind::Misuse => Ok(Err(error)),
                _ => Err(refuse(error)),
            };
        }
    }
}
