//! How everything stands that a coordinator uses.

use serde::Serialize;

use crate::lock::LockHealth;
use crate::store::StoreHealth;
use crate::types::Status;

use super::Coordinator;

/// What is known of the lock service and of the stores: see [`Coordinator::health`].
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Health {
    /// That of the part that is worst off.
    pub status: Status,
    /// The lock service.
    pub locks: LockHealth,
    /// The stores, by name.
    pub stores: Vec<StoreHealth>,
}

impl Coordinator {
    /// How the lock service and the stores stand, from what calls have shown. Does no I/O, so it
    /// may be asked as often as one likes: see [`Locks::health`](crate::Locks::health).
    #[must_use]
    pub fn health(&self) -> Health {
        let locks = self.shared.locks.health();
        let stores: Vec<_> = self.shared.stores.values().map(|store| store.health()).collect();
        let worst = stores.iter().map(|store| store.status).max();
        Health { status: worst.unwrap_or(Status::Up).max(locks.status), locks, stores }
    }
}
