//! From a URL to a lock service. The one file that names every driver.

use std::sync::Arc;

use crate::backend::{LockBackend, MemoryBackend};
use crate::error::{Error, ErrorKind, Result};
use crate::lock::{LockOptions, Locks};

/// Connects to the lock service that `url` names, with the default options.
///
/// | URL | service | feature |
/// |---|---|---|
/// | `memory:` | within this process | |
/// | `redis://[user:password@]host[:port][/db]` | one Redis server | `redis` |
/// | `rediss://[user:password@]host[:port][/db]` | the same, by TLS | `redis-tls` |
/// | `unix:path`, `redis+unix:path` | the same, by its socket | `redis` |
///
/// # Errors
/// [`InvalidInput`](ErrorKind::InvalidInput) when the URL names no known service, before any I/O;
/// [`Unavailable`](ErrorKind::Unavailable) and [`Denied`](ErrorKind::Denied) from the service.
///
/// # Cancel safety
/// Dropping the future leaves nothing behind.
///
/// ```
/// # tokio::runtime::Runtime::new().unwrap().block_on(async {
/// let locks = palisade::connect("memory:").await?;
/// assert!(locks.lock("order:7").try_acquire().await?.is_some());
/// # Ok::<(), palisade::Error>(())
/// # }).unwrap();
/// ```
pub async fn connect(url: &str) -> Result<Locks> {
    connect_with(url, LockOptions::default()).await
}

/// Connects as [`connect`] does, with these options.
///
/// # Errors
/// As [`connect`].
///
/// # Cancel safety
/// Dropping the future leaves nothing behind.
pub async fn connect_with(url: &str, options: LockOptions) -> Result<Locks> {
    let scheme = url.split(':').next().unwrap_or_default();
    let backend: Arc<dyn LockBackend> = match scheme {
        "memory" => Arc::new(MemoryBackend::new()),
        #[cfg(feature = "redis")]
        "redis" | "rediss" | "redis+unix" | "unix" => {
            use crate::backend::{RedisBackend, RedisOptions};
            Arc::new(RedisBackend::connect(url, RedisOptions::default()).await?)
        }
        _ => {
            let detail = format!("{scheme:?} is no lock service; use memory: or redis://");
            return Err(Error::new(ErrorKind::InvalidInput, "connect", detail));
        }
    };
    Locks::with_options(backend, options).await
}
