//! Who asks: owners, requests, and the client that both came from.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// One lock client of one process. Grants that were waited for are pushed to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClientId(u32);

impl ClientId {
    /// A new random client id.
    #[must_use]
    pub fn random() -> Self {
        Self(fastrand::u32(..))
    }
}

impl fmt::Display for ClientId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

/// Who may re-enter a lock: a transaction, and whoever it passes this value to.
///
/// An owner id is a value. It can be sent to another process, which may then re-enter what the
/// owner holds, or try for more; only the client that made it may wait with it, because only that
/// client knows what the owner holds elsewhere. The client is part of the id (RFC 9562, version 8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OwnerId(Uuid);

/// The version of the ids that are made here, and the bit that tells those of groups apart.
const VERSION: usize = 8;
const GROUP: u128 = 1 << 32;

impl OwnerId {
    /// A new owner of `client`.
    #[must_use]
    pub fn new(client: ClientId) -> Self {
        Self::made(client, 0)
    }

    /// A new owner of `client` that stands for a group of its requests. Nobody may ask as it: it
    /// holds what now one and now another of the group works under.
    #[must_use]
    pub fn group(client: ClientId) -> Self {
        Self::made(client, GROUP)
    }

    /// Whether this owner stands for a group of requests.
    #[must_use]
    pub fn is_group(self) -> bool {
        self.0.get_version_num() == VERSION && self.0.as_u128() & GROUP != 0
    }

    fn made(client: ClientId, mark: u128) -> Self {
        let millis = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
        let high =
            (u128::from(millis & 0xffff_ffff_ffff) << 80) | (u128::from(fastrand::u16(..)) << 64);
        let low = (u128::from(fastrand::u32(..)) << 32) | u128::from(client.0);
        Self(Uuid::new_v8((((high | low) & !GROUP) | mark).to_be_bytes()))
    }

    /// Whether `client` made this owner.
    #[must_use]
    pub fn is_of(self, client: ClientId) -> bool {
        self.client() == client
    }

    /// The client that made this owner.
    #[must_use]
    pub fn client(self) -> ClientId {
        let [.., a, b, c, d] = self.0.as_u128().to_be_bytes();
        ClientId(u32::from_be_bytes([a, b, c, d]))
    }

    /// The id as a UUID.
    #[must_use]
    pub fn as_uuid(self) -> Uuid {
        self.0
    }
}

impl From<Uuid> for OwnerId {
    fn from(uuid: Uuid) -> Self {
        Self(uuid)
    }
}

impl fmt::Display for OwnerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl FromStr for OwnerId {
    type Err = uuid::Error;

    fn from_str(text: &str) -> Result<Self, uuid::Error> {
        text.parse().map(Self)
    }
}

/// One acquire call of an owner. It makes a request that is sent twice harmless.
///
/// Unique within its owner: the upper half is random per process, the lower half counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(u64);

impl RequestId {
    /// A request id that no other call of this process uses.
    #[must_use]
    pub fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        static SALT: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
        let salt = SALT.get_or_init(|| u64::from(fastrand::u32(..)) << 32);
        Self(salt | (NEXT.fetch_add(1, Ordering::Relaxed) & 0xffff_ffff))
    }

    /// The id as a number, as drivers write it.
    #[must_use]
    pub fn as_u64(self) -> u64 {
        self.0
    }
}

impl From<u64> for RequestId {
    fn from(number: u64) -> Self {
        Self(number)
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A map by ids of this process. They are random or counted, so nobody can choose them to collide,
/// and a hash that withstands that would cost several times as much.
pub(crate) type IdMap<K, V> = HashMap<K, V, BuildHasherDefault<IdHasher>>;

/// Spreads the words of an id over all bits.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct IdHasher(u64);

impl Hasher for IdHasher {
    fn write(&mut self, bytes: &[u8]) {
        for eight in bytes.chunks(8) {
            self.write_u64(eight.iter().fold(0, |word, byte| (word << 8) | u64::from(*byte)));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0 ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(32);
    }

    fn write_usize(&mut self, _length: usize) {
        // All ids of one type have the same length.
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_knows_the_client_that_made_it() {
        let (mine, other) = (ClientId(7), ClientId(8));
        let owner = OwnerId::new(mine);
        assert!(owner.is_of(mine));
        assert!(!owner.is_of(other));
        assert_eq!(owner.as_uuid().get_version_num(), 8);
        assert_eq!(owner.to_string().parse::<OwnerId>().unwrap(), owner);
    }

    #[test]
    fn the_owner_of_a_group_is_never_taken_for_another_nor_a_foreign_id_for_it() {
        let client = ClientId::random();
        for _ in 0..1000 {
            assert!(!OwnerId::new(client).is_group());
            let group = OwnerId::group(client);
            assert!(group.is_group() && group.is_of(client));
            assert!(!OwnerId::from(Uuid::now_v7()).is_group());
        }
    }

    #[test]
    fn ids_that_are_counted_are_spread_over_all_places_of_a_map() {
        let mut places = std::collections::BTreeSet::new();
        for number in 0..256_u64 {
            let mut hasher = IdHasher::default();
            hasher.write_u64(number << 32 | 0xffff_0000 | number);
            let hash = hasher.finish();
            // A map takes the lowest bits for the place and the highest seven for a tag.
            places.insert((hash & 0xff, hash >> 57));
        }
        assert!(places.len() > 240, "{}", places.len());
    }

    #[test]
    fn requests_of_one_process_differ() {
        let mut all: Vec<_> = (0..1000).map(|_| RequestId::next()).collect();
        all.dedup();
        assert_eq!(all.len(), 1000);
    }
}
