//! Who is in the way, and whether its time is over.

use std::time::Duration;

use sqlx::{PgConnection, Postgres};
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::sql::postgres::{CONTACT, END_SESSION, PUBLISH_MORE, hex, name, unhex};
use crate::sql::{classify, sqlstate};
use crate::types::ResourceKey;

use super::super::sql_store::SqlStore;
use super::super::{Fence, Held, Issuer};
use super::fence::{announced, columns};

/// How long the publishing of added keys waits for a connection.
const A_MOMENT: Duration = Duration::from_millis(100);

/// Whether the fence statement found its rows locked, or lost against a branch that came before.
pub(super) fn is_blocked(error: &sqlx::Error) -> bool {
    matches!(&*sqlstate(error), "55P03" | "57014" | "40001" | "40P01")
}

/// Ends the sessions in the way whose time is over. Without a token of the lock service nobody's
/// is.
///
/// # Errors
/// [`ErrorKind::Misuse`] when the branch in the way is one of the same owner, which would wait for
/// itself.
pub(super) async fn contact(conn: &mut PgConnection, fence: &Fence, held: &[Held]) -> Result<()> {
    let (keys, exclusive, mut tokens) = columns(held, hex);
    if fence.issuer == Issuer::Store {
        // It has nothing to show that would end anybody's time.
        tokens.fill(0);
    }
    let named: Vec<_> = keys.iter().map(|hex| name::key(hex)).collect();
    let marked: Vec<_> = tokens.iter().map(|token| name::token(*token)).collect();
    let found: Result<Vec<(String, bool, bool)>, _> = sqlx::query_as(CONTACT)
        .bind(keys)
        .bind(exclusive)
        .bind(tokens)
        .bind(fence.owner.as_uuid())
        .bind(name::start(fence.attempt))
        .bind(named)
        .bind(marked)
        .bind(name::owner(fence.owner.as_uuid()))
        .fetch_all(conn)
        .await;
    let found = match found {
        Ok(found) => found,
        // Without the right to end a session of another role there is only waiting.
        Err(error) if sqlstate(&error) == "42501" => Vec::new(),
        Err(error) => return Err(classify("fence", error)),
    };
    if let Some((key, _, _)) = found.iter().find(|(_, own, _)| *own) {
        let detail = "this owner already has a branch open in this store that holds the key, and \
                      would wait for itself; use that branch, or end it first";
        let error = Error::new(ErrorKind::Misuse, "fence", detail);
        let key = unhex(key).and_then(|key| ResourceKey::parse(key).ok());
        return Err(match key {
            Some(key) => error.with_key(key),
            None => error,
        });
    }
    let ended = found.iter().filter(|(_, _, ended)| *ended).count();
    if ended > 0 {
        tracing::warn!(ended, attempt = %fence.attempt, "ended sessions of overtaken holders");
    }
    Ok(())
}

/// Publishes keys that were added to an open branch. Best effort, on another connection if one is
/// free in a moment: without it, whoever meets these keys later waits for the session's own
/// time-outs.
pub(super) async fn publish_more(store: &SqlStore<Postgres>, fence: &Fence, held: &[Held]) {
    if store.pool().options().get_max_connections() < 2 {
        return;
    }
    let Ok(Ok(mut conn)) = timeout(A_MOMENT, store.pool().acquire()).await else { return };
    let (keys, exclusive, tokens) = announced(fence, held);
    let published = sqlx::query(PUBLISH_MORE)
        .bind(keys)
        .bind(exclusive)
        .bind(tokens)
        .bind(fence.attempt)
        .bind(name::start(fence.attempt))
        .bind(fence.owner.as_uuid())
        .execute(&mut *conn)
        .await;
    if let Err(error) = published {
        tracing::debug!(%error, "added keys were not published");
    }
}

/// Ends the session of an attempt and waits until it is gone.
///
/// # Errors
/// When the store cannot be reached, or the session is still there at `deadline`.
pub(super) async fn end_session(
    conn: &mut PgConnection,
    attempt: Uuid,
    deadline: Instant,
) -> Result<(), sqlx::Error> {
    loop {
        let told: i64 = sqlx::query_scalar(END_SESSION)
            .bind(name::start(attempt))
            .fetch_one(&mut *conn)
            .await?;
        if told == 0 {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(sqlx::Error::PoolTimedOut);
        }
        sleep(Duration::from_millis(5)).await;
    }
}
