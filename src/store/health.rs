//! How a store stands, as this process sees it.

use serde::Serialize;

use crate::types::Status;

/// What is known of a store without asking it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct StoreHealth {
    /// The name that the program gave it.
    pub name: String,
    /// `Down` when its pool was closed, `Degraded` when the last branch could not be opened because
    /// the database was not reached.
    pub status: Status,
    /// Why it is not `Up`.
    pub reason: Option<String>,
    /// How many connections its pool has.
    pub connections: Option<u32>,
    /// How many of them are idle.
    pub idle: Option<u32>,
}

impl StoreHealth {
    /// A store of which nothing bad is known, nor anything else.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        let name = name.into();
        Self { name, status: Status::Up, reason: None, connections: None, idle: None }
    }
}
