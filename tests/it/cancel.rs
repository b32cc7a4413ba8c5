//! Dropping a future at each of its awaits, one after the other.

use std::future::Future;
use std::pin::pin;
use std::task::Poll;

/// Polls `future` to its `n`-th pending answer, then drops it. `true` if it had finished before.
pub async fn drop_after<F: Future>(future: F, n: usize) -> bool {
    let mut future = pin!(future);
    let mut pending = 0;
    std::future::poll_fn(|context| match future.as_mut().poll(context) {
        Poll::Ready(_) => Poll::Ready(true),
        Poll::Pending if pending == n => Poll::Ready(false),
        Poll::Pending => {
            pending += 1;
            Poll::Pending
        }
    })
    .await
}

/// Runs `attempt` with 0, 1, 2, … awaits let through until it finishes, and `check` after each.
/// Returns at how many awaits it was dropped.
pub async fn at_every_await<F, C>(
    mut attempt: impl FnMut() -> F,
    mut check: impl FnMut() -> C,
) -> usize
where
    F: Future,
    C: Future<Output = ()>,
{
    for n in 0..1_000 {
        let finished = drop_after(attempt(), n).await;
        check().await;
        if finished {
            return n;
        }
    }
    panic!("the future has no end");
}
