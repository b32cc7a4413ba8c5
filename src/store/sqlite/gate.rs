//! The line of this process's branches for the one write lock of a database.

use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use crate::error::{Error, ErrorKind, Result};
use crate::types::OwnerId;

use super::super::Fence;
use super::opening::blocked;

/// How long an owner waits for itself.
const A_MOMENT: Duration = Duration::from_millis(150);

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
    ///
    /// An owner that is in the way of itself is told after a moment: its other branch may just be
    /// ending.
    pub(super) async fn enter(&self, fence: &Fence) -> Result<Pass> {
        let mut turn = pin!(Arc::clone(&self.line).acquire_owned());
        let moment = fence.deadline.min(Instant::now() + A_MOMENT);
        let permit = match timeout_at(moment, &mut turn).await {
            Ok(permit) => permit,
            Err(_) if self.is_inside(fence.owner) => {
                let detail = "this owner already has a branch open in this store, and would wait \
                              for itself; use that branch, or end it first";
                return Err(Error::new(ErrorKind::Misuse, "fence", detail));
            }
            Err(_) => timeout_at(fence.deadline, turn).await.map_err(|_| blocked())?,
        };
        let permit = permit.map_err(|_| blocked())?;
        *self.inside.lock().unwrap_or_else(PoisonError::into_inner) = Some(fence.owner);
        Ok(Pass { inside: Arc::clone(&self.inside), _permit: permit })
    }

    fn is_inside(&self, owner: OwnerId) -> bool {
        *self.inside.lock().unwrap_or_else(PoisonError::into_inner) == Some(owner)
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        *self.inside.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
