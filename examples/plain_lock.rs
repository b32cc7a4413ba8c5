//! A lock on its own, without a store: one worker at a time writes the report.
//!
//! ```sh
//! cargo run --example plain_lock
//! ```
//!
//! The locks are in memory here. With `redis://127.0.0.1:6379` in the place of `memory:` the same
//! program runs in many processes.

use std::time::Duration;

use palisade::{Error, Locks};

#[tokio::main]
async fn main() -> Result<(), Error> {
    let locks = palisade::connect("memory:").await?;

    // Acquire, hold, release. A guard that is dropped is released too, in the background.
    let guard = locks.lock("report:may").metadata("the nightly job").acquire().await?;
    println!("locked, token {}, held for {:?} so far", guard.token(), guard.info().held_for);

    // Somebody else sees that it is taken, and by whom, without waiting.
    assert!(locks.lock("report:may").try_acquire().await?.is_none());
    for holder in locks.inspect("report:may").await?.holders {
        println!("held by {:?}", holder.metadata.as_deref().unwrap_or("somebody"));
    }

    // Or waits in line, and is handed the lock by the release.
    let next = tokio::spawn(write_report(locks.clone(), "the second"));
    tokio::task::yield_now().await;
    guard.release().await?;
    next.await.expect("the task does not panic")?;

    // The token is for whatever the lock protects: a file server, a device, an API. That remembers
    // the highest token it has seen and refuses lower ones, so that a holder that was paused for
    // too long cannot write over newer work. In an SQL database palisade does that by itself.
    let several = locks.lock_all(["report:june", "report:july"]);
    let guard = several.ttl(Duration::from_secs(5)).wait(Duration::from_secs(1)).acquire().await?;
    for held in guard.keys() {
        println!("{} is held with token {}", held.key, held.token);
    }
    guard.release().await?;

    // Gives up what is still held, and waits until that is done.
    locks.shutdown().await
}

/// The closure ends with the work or with the lease, whichever is first.
async fn write_report(locks: Locks, who: &str) -> Result<(), Error> {
    let request = locks.lock("report:may");
    request
        .with_lock(async |locked| {
            println!("{who} worker writes, token {}", locked.token());
            Ok(())
        })
        .await
}
