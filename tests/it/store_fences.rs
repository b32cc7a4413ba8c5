//! Fences as a transaction would show them, for tests of the stores alone.

use std::sync::Arc;
use std::time::Duration;

use palisade::store::{AnyBranch, Fence, Held, Issuer, Outcome};
use palisade::{
    ClientId, Error, FencingToken, Lease, LeaseState, Mode, OwnerId, RequestId, ResourceKey,
};
use tokio::time::Instant;
use uuid::Uuid;

pub fn held(key: &str, mode: Mode, token: u64) -> Held {
    let key = ResourceKey::parse(key).unwrap();
    Held { key, mode, token: FencingToken::new(token).unwrap() }
}

/// A fence of a new owner that waits for five seconds.
pub fn fence(mut held: Vec<Held>) -> Fence {
    held.sort_by(|a, b| a.key.cmp(&b.key));
    Fence {
        attempt: Uuid::now_v7(),
        owner: OwnerId::new(ClientId::random()),
        held,
        issuer: Issuer::LockService,
        lease: Lease::new(Duration::from_secs(20)).unwrap(),
        state: Arc::new(LeaseState::new(Instant::now() + Duration::from_secs(60))),
        deadline: Instant::now() + Duration::from_secs(5),
    }
}

/// One key, exclusively.
pub fn write(key: &str, token: u64) -> Fence {
    fence(vec![held(key, Mode::Exclusive, token)])
}

/// One key, shared.
pub fn share(key: &str, token: u64) -> Fence {
    fence(vec![held(key, Mode::Shared, token)])
}

/// Another attempt of the same owner, with the same tokens.
pub fn again(fence: &Fence) -> Fence {
    let deadline = Instant::now() + Duration::from_secs(5);
    Fence { attempt: Uuid::now_v7(), deadline, ..fence.clone() }
}

/// The same keys for a new owner without a lock service. Its tokens are to be exceeded.
pub fn degraded(held: Vec<Held>) -> Fence {
    Fence { issuer: Issuer::Store, state: Arc::default(), ..fence(held) }
}

pub fn with_wait(fence: Fence, wait: Duration) -> Fence {
    Fence { deadline: Instant::now() + wait, ..fence }
}

pub fn with_lease(fence: Fence, lease: Duration) -> Fence {
    let state = LeaseState::default();
    state.cover(RequestId::next(), Instant::now() + Duration::from_secs(60));
    Fence { lease: Lease::new(lease).unwrap(), state: Arc::new(state), ..fence }
}

pub async fn commit(branch: &Arc<dyn AnyBranch>) {
    let outcome = branch.commit().await;
    assert!(matches!(outcome, Outcome::Committed), "{outcome:?}");
}

pub fn rolled_back(outcome: Outcome) -> Error {
    match outcome {
        Outcome::RolledBack(error) => error,
        other => panic!("it should have been rolled back: {other:?}"),
    }
}

pub fn in_doubt(outcome: Outcome) -> Error {
    match outcome {
        Outcome::InDoubt(error) => error,
        other => panic!("it should have been in doubt: {other:?}"),
    }
}
