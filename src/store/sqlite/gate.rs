//! The line of this process's branches for the one write lock of a database.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout_at;

use crate::error::{Error, ErrorKind, Result};
use crate::types::OwnerId;

use super::super::Fence;
use super::opening::blocked;

/// One branch at a time. Without it they would poll for the lock, and an owner that meets itself
/// would wait for itself.
#[derive(Debug)]
pub struct Gate {
    line: Arc<Semaphore>,
    inside: Arc<Mutex<Option<OwnerId>>>,
}

/// The right to try for the write lock.
#[derive(Debug)]
pub struct Pass {
    inside: Arc<Mutex<Option<OwnerId>>>,
    _permit: OwnedSemaphorePermit,
}

impl Default for Gate {
    fn default() -> Self {
        Self { line: Arc::new(Semaphore::new(1)), inside: Arc::default() }
    }
}

impl Gate {
    /// Waits for the branches before this one, until the deadline of its fence.
    pub(super) async fn enter(&self, fence: &Fence) -> Result<Pass> {
        let inside = *self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        if inside == Some(fence.owner) {
            let detail = "this owner already has a branch open in this store, and would wait for \
                          itself; use that branch, or end it first";
            return Err(Error::new(ErrorKind::Misuse, "fence", detail));
        }
        match timeout_at(fence.deadline, Arc::clone(&self.line).acquire_owned()).await {
            Ok(Ok(permit)) => {
                *self.inside.lock().unwrap_or_else(PoisonError::into_inner) = Some(fence.owner);
                Ok(Pass { inside: Arc::clone(&self.inside), _permit: permit })
            }
            _ => Err(blocked()),
        }
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        *self.inside.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
