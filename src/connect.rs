//! From a URL to a lock service. The one file that names every driver.

use crate::backend::MemoryBackend;
use crate::error::{Error, ErrorKind, Result};
use crate::lock::Locks;

/// Connects to the lock service that `url` names.
///
/// | URL | service |
/// |---|---|
/// | `memory:` | within this process |
///
/// # Errors
/// [`InvalidInput`](ErrorKind::InvalidInput) when the URL names no known service, before any I/O;
/// [`Unavailable`](ErrorKind::Unavailable) and [`Denied`](ErrorKind::Denied) from the service.
///
/// # Cancel safety
/// Dropping the future leaves nothing behind.
pub async fn connect(url: &str) -> Result<Locks> {
    let scheme = url.split(':').next().unwrap_or_default();
    match scheme {
        "memory" => Locks::new(MemoryBackend::new()).await,
        _ => {
            let detail = format!("{scheme:?} is no lock service; use memory:");
            Err(Error::new(ErrorKind::InvalidInput, "connect", detail))
        }
    }
}
