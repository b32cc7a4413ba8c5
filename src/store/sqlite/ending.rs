//! Ending a branch: prove that it is still the fenced transaction, end it, and find out what became
//! of it when that fails.

use std::time::Duration;

use sqlx::Sqlite;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::error::Result;
use crate::sql::sqlite::{LOOK, json};
use crate::sql::{classify, refuse};

use super::super::Outcome;
use super::super::core::doubt;
use super::super::database::Ending;
use super::super::session::Session;
use super::super::verdict::{Looked, Settled, settle};
use super::opening::{begin, give_back, pause, probe, run};

const OTHER: &str = "the transaction that was fenced has ended already: a COMMIT or ROLLBACK was \
                     sent through the branch";

/// Why a branch did not commit.
enum End {
    /// The open transaction is not the one that was fenced.
    Other,
    Failed(sqlx::Error),
}

/// Commits, and finds out what became of it if that fails.
pub(super) async fn commit(mut session: Session<Sqlite>, ending: Ending<'_, Sqlite>) -> Outcome {
    match finish(&mut session, &ending).await {
        Ok(()) => {
            give_back(session).await;
            Outcome::Committed
        }
        Err(End::Other) => other_transaction(session, &ending),
        Err(End::Failed(error)) => {
            let open = match session.conn() {
                Ok(conn) => run(conn, "ROLLBACK").await.is_ok(),
                Err(_) => false,
            };
            let why = classify("commit", error).with_transaction(ending.fence.attempt);
            if open {
                // It could be rolled back, so it was open, so it was not committed.
                give_back(session).await;
                return Outcome::RolledBack(why);
            }
            drop(session);
            match look(&ending).await {
                Settled::Committed => Outcome::Committed,
                Settled::RolledBack => Outcome::RolledBack(why),
                Settled::Unknown(detail) => {
                    Outcome::InDoubt(doubt(ending.fence, detail).with_source(why))
                }
            }
        }
    }
}

/// Rolls back, and looks if the transaction is not there any more.
pub(super) async fn rollback(
    mut session: Session<Sqlite>,
    ending: Ending<'_, Sqlite>,
    failed: bool,
) -> Result<()> {
    let sql = match ending.read_only {
        true => "ROLLBACK".to_owned(),
        false => format!("ROLLBACK TO {}; ROLLBACK", probe(ending.fence)),
    };
    match run(session.conn()?, sql).await {
        Ok(()) => {
            give_back(session).await;
            Ok(())
        }
        Err(_) if ending.read_only => Ok(()),
        Err(error) => {
            drop(session);
            // SQLite rolls back on its own after some failures, such as a full disk; then the
            // rows are as they were.
            if failed && look(&ending).await == Settled::RolledBack {
                return Ok(());
            }
            Err(doubt(ending.fence, OTHER).with_source(error))
        }
    }
}

/// Proves the transaction and commits it. A reader elsewhere may keep the file busy for a moment.
async fn finish(session: &mut Session<Sqlite>, ending: &Ending<'_, Sqlite>) -> Result<(), End> {
    let conn = session.conn().map_err(|error| End::Failed(refuse(error)))?;
    if !ending.read_only {
        let sql = format!("RELEASE {}", probe(ending.fence));
        run(conn, sql).await.map_err(|_| End::Other)?;
    }
    let unleased = Instant::now() + ending.fence.lease.get();
    loop {
        match run(conn, "COMMIT").await {
            Ok(()) => return Ok(()),
            Err(error) if !ending.fence.state.is_held() => return Err(End::Failed(error)),
            Err(error) => {
                let deadline = ending.fence.state.deadline().unwrap_or(unleased);
                pause(error, deadline).await.map_err(End::Failed)?;
            }
        }
    }
}

fn other_transaction(session: Session<Sqlite>, ending: &Ending<'_, Sqlite>) -> Outcome {
    drop(session);
    Outcome::InDoubt(doubt(ending.fence, OTHER))
}

/// Looks under the write lock what became of a commit, for one lease at the longest.
async fn look(ending: &Ending<'_, Sqlite>) -> Settled {
    let patience = ending.fence.lease.get().max(Duration::from_secs(1));
    let deadline = Instant::now() + patience;
    let priors = ending.facts.priors();
    let keys = json(priors.iter().map(|prior| (prior.key.as_str(), true, prior.token.get())));
    let attempt = async || -> Result<Settled> {
        let mut session = begin(ending.store, "commit", None, deadline).await?;
        let rows: Vec<(String, i64, Option<Uuid>, i64)> = sqlx::query_as(LOOK)
            .bind(keys.as_str())
            .fetch_all(session.conn()?)
            .await
            .map_err(|error| classify("commit", error))?;
        run(session.conn()?, "ROLLBACK").await.map_err(|error| classify("commit", error))?;
        give_back(session).await;
        let row = |(resource, write_token, write_tx, mark)| Looked {
            resource,
            write_token,
            write_tx,
            mark,
        };
        let rows: Vec<_> = rows.into_iter().map(row).collect();
        Ok(settle(ending.fence.attempt, priors, &rows))
    };
    loop {
        match attempt().await {
            Ok(settled) => return settled,
            Err(_) if Instant::now() < deadline => sleep(Duration::from_millis(50)).await,
            Err(_) => return Settled::Unknown("the store could not be asked what became of it"),
        }
    }
}
