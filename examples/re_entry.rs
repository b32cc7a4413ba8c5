//! Re-entry: a function locks what its caller has locked already.
//!
//! ```sh
//! cargo run --example re_entry
//! ```
//!
//! Who holds a lock is an *owner*, a value that is passed on. The same owner gets the same key
//! again at once, past everybody who waits, and with the same token.

use palisade::{Error, ErrorKind, Locks, OwnerId};

#[tokio::main]
async fn main() -> Result<(), Error> {
    let locks = palisade::connect("memory:").await?;

    let owner = locks.owner();
    let order = locks.lock("order:7").owner(owner).acquire().await?;
    println!("the order is locked, token {}", order.token());

    // Somebody else is in line before the function is called; it does not have to wait for them.
    let other = tokio::spawn(locks.lock("order:7").acquire());
    while locks.inspect("order:7").await?.waiters.is_empty() {
        tokio::task::yield_now().await;
    }
    add_item(&locks, owner).await?;

    // Each guard counts. The key is free when the last one is released.
    let again = locks.lock("order:7").owner(owner).acquire().await?;
    assert_eq!(again.token(), order.token());
    println!("entered {} times", again.info().hold_count);
    order.release().await?;
    assert!(!other.is_finished(), "one entry is left");
    again.release().await?;

    let other = other.await.expect("the task does not panic")?;
    println!("now the other one has it, token {}", other.token());
    other.release().await?;

    // A limit finds the recursion that has no end.
    let mut guards = Vec::new();
    let error = loop {
        match locks.lock("order:8").owner(owner).max_entries(3).acquire().await {
            Ok(guard) => guards.push(guard),
            Err(error) => break error,
        }
    };
    assert_eq!((guards.len(), error.kind()), (3, ErrorKind::LimitReached));
    println!("{error}");
    Ok(())
}

/// Locks what it needs, whether or not its caller did.
async fn add_item(locks: &Locks, owner: OwnerId) -> Result<(), Error> {
    let order = locks.lock("order:7").owner(owner).acquire().await?;
    println!("an item is added under the same token, {}", order.token());
    order.release().await
}
