//! Scenarios for the fence in a store.

use palisade::{FencingToken, Result};

use super::Verdict;
use super::counter::{Counter, KEY};
use super::holder::{Holder, LONG, SHORT};
use super::service::Service;

/// How a process comes to lose its key without knowing.
#[derive(Clone, Copy, Debug)]
pub enum Loss {
    /// It pauses past its lease.
    Lease,
    /// The lock service loses its memory, and with it the token that it gave out last: the next
    /// holder gets the same one.
    Memory,
}

/// Between two branches of one process, another one is granted its key and raises the counter. The
/// first then writes what it had read before.
pub async fn overtaken(service: &Service, mut counter: Counter, loss: Loss) -> Verdict {
    counter.raise(service).await.unwrap();
    let lease = match loss {
        Loss::Lease => SHORT,
        Loss::Memory => LONG,
    };
    // The service's clock is below the floor, so its memory alone tells tokens apart.
    let floor = an_hour_ahead(service).await;
    let mut first = Holder::new(service, KEY, lease).above(floor);
    first.acquire().await;
    let seen = counter.look(&first).await.unwrap();
    if let Loss::Memory = loss {
        service.forget();
    }
    let mut second = Holder::new(service, KEY, LONG).above(floor);
    second.acquire().await;
    let same = second.token() == first.token();
    assert_eq!(same, matches!(loss, Loss::Memory), "the fault is in place");
    let next = match counter.begin(&second).await {
        Ok(work) => counter.write(work.seen + 1, work).await,
        Err(refused) => Err(refused),
    };
    let woken = match counter.begin(&first).await {
        Ok(work) => counter.write(seen + 1, work).await,
        Err(refused) => Err(refused),
    };
    second.release().await;
    counter.raise(service).await.unwrap();
    verdict(&counter, woken, next).await
}

/// A token far above the clock, as a floor that a store has named.
async fn an_hour_ahead(service: &Service) -> FencingToken {
    let mut holder = Holder::new(service, "another key", LONG);
    holder.acquire().await;
    holder.release().await;
    FencingToken::new(holder.token().get() + 3_600_000_000).unwrap()
}

/// A process pauses past its lease in the midst of its branch, and goes on after another one has
/// been granted its key and has read, too.
pub async fn overlap(service: &Service, mut counter: Counter) -> Verdict {
    counter.raise(service).await.unwrap();
    let mut first = Holder::new(service, KEY, SHORT);
    first.acquire().await;
    let paused = counter.begin(&first).await.unwrap();
    let mut second = Holder::new(service, KEY, LONG);
    second.acquire().await;
    let raises = counter.begin(&second).await.unwrap();
    let woken = counter.write(paused.seen + 1, paused).await;
    let next = counter.write(raises.seen + 1, raises).await;
    second.release().await;
    counter.raise(service).await.unwrap();
    verdict(&counter, woken, next).await
}

/// Between two branches of a process that holds the key, another one that is cut off from the lock
/// service raises the counter, with nothing but the fence rows. The first then writes what it had
/// read before.
pub async fn cut_off(service: &Service, mut counter: Counter) -> Verdict {
    counter.raise(service).await.unwrap();
    let mut first = Holder::new(service, KEY, LONG);
    first.acquire().await;
    let seen = counter.look(&first).await.unwrap();
    let work = counter.begin_without_locks().await.unwrap();
    let next = counter.write(work.seen + 1, work).await;
    let woken = match counter.begin(&first).await {
        Ok(work) => counter.write(seen + 1, work).await,
        Err(refused) => Err(refused),
    };
    first.release().await;
    let work = counter.begin_without_locks().await.unwrap();
    counter.write(work.seen + 1, work).await.unwrap();
    verdict(&counter, woken, next).await
}

/// What the counter says, and what the two were told: one of them at least is not stale.
async fn verdict(counter: &Counter, woken: Result<()>, next: Result<()>) -> Verdict {
    let told = |answer: &Result<()>| match answer {
        Ok(()) => "committed".to_owned(),
        Err(error) => format!("{:?}", error.kind()),
    };
    let told = format!("who lost the key was told {}, the next {}", told(&woken), told(&next));
    assert!(woken.is_ok() || next.is_ok(), "nothing was put to the test: {told}");
    counter.check().await.map(|seen| format!("{seen}, {told}"))
}
