//! Known bugs, planted at run time, so that a test can show that it would find them.
//!
//! A test that has never failed proves little. Here, the scripts of the Redis driver and the fence
//! statement of a store can be edited for one backend or one store, beside others of the same
//! process that are left as they are. Never use them outside of a test.
//!
//! # Why edits of the text and no switches in the code?
//! A switch would have to be read, and could be left on, by everybody. The texts are data already.
//! And an [`Edit`] names the very fragment that it breaks: where that is rewritten, the bug fails
//! to be planted and says so, instead of being planted no more.

#[cfg(any(feature = "postgres", feature = "redis", feature = "sqlite"))]
mod planting;

#[cfg(any(feature = "postgres", feature = "sqlite"))]
use crate::store::{SqlDatabase, SqlStore};
#[cfg(feature = "redis")]
use {
    crate::backend::{RedisBackend, RedisOptions},
    crate::error::Result,
};

#[cfg(any(feature = "postgres", feature = "redis", feature = "sqlite"))]
use planting::Planting;

/// One change to one text.
// exhaustive: it is written down as a constant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edit {
    /// Which text: `acquire`, `renew`, `release`, `cancel`, `inspect` or `together` for a script of
    /// Redis, each with the pieces that it is made of; `fence` for the statement of a store, and
    /// `store_fence` for the one that it uses without a lock service.
    pub of: &'static str,
    /// What is replaced. It must be there exactly once.
    pub fragment: &'static str,
    /// What stands there instead.
    pub instead: &'static str,
}

/// Connects to a Redis server as [`RedisBackend::connect`] does, with `edits` in its scripts.
///
/// # Errors
/// [`Misuse`](crate::ErrorKind::Misuse) when an edit names no script or a fragment that is not in
/// it exactly once; else as [`RedisBackend::connect`].
///
/// # Cancel safety
/// As [`RedisBackend::connect`].
#[cfg(feature = "redis")]
pub async fn planted_redis(url: &str, edits: &[Edit]) -> Result<RedisBackend> {
    let mut planting = Planting::of(edits);
    let edit = |name, text| planting.edit(name, text);
    let backend = RedisBackend::connect_edited(url, RedisOptions::default(), edit).await?;
    planting.end()?;
    Ok(backend)
}

/// A store of the same database whose fence statements have `edits` in them.
///
/// ```
/// # #[cfg(feature = "sqlite")]
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # tokio::runtime::Runtime::new()?.block_on(async {
/// use palisade::SqlStore;
/// use palisade::testing::{Edit, planted_store};
///
/// let pool = sqlx::SqlitePool::connect("sqlite::memory:").await?;
/// let healthy = SqlStore::new("bank", pool);
/// // Whoever shows a token that was seen before passes, whether it is theirs or not.
/// let duplicates = Edit {
///     of: "fence",
///     fragment: "AND f.write_owner IS excluded.write_owner",
///     instead: "",
/// };
/// let planted = planted_store(&healthy, &[duplicates])?;
/// let nowhere = Edit { fragment: "DROP TABLE", ..duplicates };
/// assert!(planted_store(&healthy, &[nowhere]).is_err());
/// # Ok(()) })
/// # }
/// # #[cfg(not(feature = "sqlite"))]
/// # fn main() {}
/// ```
///
/// # Errors
/// [`Misuse`](crate::ErrorKind::Misuse) when an edit names another text or a fragment that is not
/// in it exactly once.
#[cfg(any(feature = "postgres", feature = "sqlite"))]
pub fn planted_store<DB: SqlDatabase>(
    store: &SqlStore<DB>,
    edits: &[Edit],
) -> crate::error::Result<SqlStore<DB>> {
    let (mut planting, mut store) = (Planting::of(edits), store.clone());
    store.fence = planting.edit("fence", store.fence)?;
    store.store_fence = planting.edit("store_fence", store.store_fence)?;
    planting.end()?;
    Ok(store)
}
