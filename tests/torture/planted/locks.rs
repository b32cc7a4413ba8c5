//! Scenarios for the lock service.

use std::time::Duration;

use palisade::protocol::Released;
use tokio::time::Instant;

use super::Verdict;
use super::holder::{Holder, LONG, SHORT, exclusive};
use super::service::Service;

const KEY: &str = "key";

/// How long a key is waited for whose lease is over: many leases.
const PATIENCE: Duration = Duration::from_secs(5);

/// Without faults, one holder follows the other. A planted bug must not matter here.
async fn round(service: &Service) {
    for _ in 0..2 {
        let mut holder = Holder::new(service, KEY, LONG);
        assert!(holder.try_acquire().await.unwrap(), "the key is free");
        assert!(!Holder::new(service, KEY, LONG).try_acquire().await.unwrap(), "now it is not");
        assert_eq!(holder.release().await, Released::Released);
    }
}

/// A process pauses past its lease, and releases what has been another's since.
pub async fn late_release(service: &Service) -> Verdict {
    round(service).await;
    let mut paused = Holder::new(service, KEY, SHORT);
    paused.acquire().await;
    let mut next = Holder::new(service, KEY, LONG);
    next.acquire().await;
    paused.release().await;
    let mut third = Holder::new(service, KEY, LONG);
    third.try_acquire().await.unwrap();
    let verdict = exclusive(&[&paused, &next, &third])?;
    next.release().await;
    round(service).await;
    Ok(verdict)
}

/// A process pauses past its lease, and renews what has been another's since.
pub async fn late_renewal(service: &Service) -> Verdict {
    round(service).await;
    let mut paused = Holder::new(service, KEY, SHORT);
    paused.acquire().await;
    let mut next = Holder::new(service, KEY, LONG);
    next.acquire().await;
    paused.renew(LONG).await;
    let verdict = exclusive(&[&paused, &next])?;
    next.release().await;
    round(service).await;
    Ok(verdict)
}

/// An acquire is cut off in the middle, and its process never comes back.
pub async fn failure_in_acquire(service: &Service) -> Verdict {
    round(service).await;
    let mut dies = Holder::new(service, KEY, SHORT);
    service.permit("pexpire", false);
    let granted = dies.try_acquire().await;
    service.permit("pexpire", true);
    assert!(granted.unwrap_or(true), "it was granted or cut off");
    let (asked, mut next) = (Instant::now(), Holder::new(service, KEY, LONG));
    if !next.is_granted_within(PATIENCE).await {
        return Err(format!("an immortal lock: a lease of {SHORT:?} lasts after {PATIENCE:?}"));
    }
    let after = asked.elapsed();
    next.release().await;
    round(service).await;
    Ok(format!("the lease of {SHORT:?} was over after {after:.1?}"))
}

/// The reply to an acquire is lost, so the request is sent again.
pub async fn lost_reply(service: &Service) -> Verdict {
    round(service).await;
    let mut holder = Holder::new(service, KEY, LONG);
    service.lose_reply(KEY);
    assert!(holder.try_acquire().await.unwrap(), "it was free");
    assert!(service.has_lost_reply().await, "the fault is in place");
    let held = holder.entries().await;
    holder.release().await;
    let left = holder.entries().await;
    if (held, left) != (1, 0) {
        let counts = format!("{held} entries after one grant, {left} after its release");
        return Err(format!("a wrong count: {counts}"));
    }
    round(service).await;
    Ok("one entry after one grant, none after its release".to_owned())
}
