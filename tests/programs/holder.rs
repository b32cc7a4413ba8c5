//! A process that takes a lock, says how far it got, and does what its standard input says; the
//! tests stop and kill it at a step of their choice.
//!
//! `holder LOCKS_URL STORE_URL LEASE_MS KEY STEP` with STEP `lock` (begin, no branch), `write`
//! (begin, branch, an update that is not committed), `wait` (begin, waiting in line) or `degraded`
//! (as `write`, after a line, and on the fence rows where the lock service is away by then). It
//! prints `connected`, `waiting`, `locked` or `written`, then reads `write` or `commit` and prints
//! what came of it.

use std::io::{BufRead, Write};
use std::time::Duration;

use palisade::{Coordinator, Error, Fallback, SqlStore, Transaction};
use sqlx::Postgres;
use sqlx::postgres::PgPoolOptions;

const ADD: &str = "UPDATE account SET cents = cents + 1 WHERE name = $1";

#[tokio::main]
async fn main() -> Result<(), Error> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [locks, store, lease, key, step] = arguments.as_slice() else {
        panic!("five arguments, please");
    };
    let pool = PgPoolOptions::new().max_connections(2).connect(store).await?;
    let bank = SqlStore::new("bank", pool);
    let locks = palisade::connect(locks).await?;
    let lease = Duration::from_millis(lease.parse().expect("milliseconds"));
    let coordinator = Coordinator::builder(locks.clone()).store(&bank).lease(lease).build();

    let mut request = coordinator.transaction([key]).wait(Duration::from_secs(60));
    if step == "degraded" {
        request = request.stores([&bank]).fallback(Fallback::StoreFence);
        say("connected");
        std::io::stdin().read_line(&mut String::new()).expect("a line");
    }
    if step == "wait" {
        let begin = tokio::spawn(request.clone().begin());
        while locks.inspect(key).await?.waiters.is_empty() {
            tokio::task::yield_now().await;
        }
        say("waiting");
        let tx = begin.await.expect("it does not panic")?;
        say("locked");
        return tx.rollback().await;
    }
    let tx = request.begin().await?;
    if step == "write" || step == "degraded" {
        write(&tx, &bank, key).await?;
        say("written");
    } else {
        say("locked");
    }
    for line in std::io::stdin().lock().lines() {
        match line.expect("text").as_str() {
            "write" => report("written", write(&tx, &bank, key).await),
            "commit" => {
                report("committed", tx.commit().await);
                return Ok(());
            }
            other => panic!("no such command: {other}"),
        }
    }
    Ok(())
}

async fn write(tx: &Transaction, bank: &SqlStore<Postgres>, key: &str) -> Result<(), Error> {
    let db = tx.enlist(bank).await?;
    sqlx::query(ADD).bind(key).execute(&db).await?;
    Ok(())
}

fn report(done: &str, answer: Result<(), Error>) {
    match answer {
        Ok(()) => say(done),
        Err(error) => say(&format!("{:?}", error.kind())),
    }
}

fn say(word: &str) {
    println!("{word}");
    std::io::stdout().flush().expect("somebody listens");
}
