//! Resource keys, the mode in which they are wanted, and the order in which they are taken.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The longest key in bytes.
///
/// Every store keeps the key as the primary key of its fence row, and the smallest index limit
/// among them is MySQL's (3072 bytes, with other columns beside it).
pub const MAX_KEY_BYTES: usize = 512;

/// The most keys that one request may name.
///
/// A set is taken by one script, and Lua's `unpack` ends near 8000 values.
pub const MAX_KEYS: usize = 1_000;

/// The name of a resource that is locked, such as `account:alice`.
///
/// Any UTF-8 text of 1 to 512 bytes without NUL (PostgreSQL cannot store one). Keys are compared
/// and ordered byte by byte.
///
/// ```
/// use palisade::ResourceKey;
///
/// let key = ResourceKey::parse("account:alice")?;
/// assert_eq!(key.as_str(), "account:alice");
/// assert!(ResourceKey::parse("").is_err());
/// # Ok::<(), palisade::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ResourceKey(Arc<str>);

/// Why a text is not a [`ResourceKey`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidKey {
    /// The text is empty.
    #[error("a resource key must not be empty")]
    Empty,
    /// The text is longer than [`MAX_KEY_BYTES`].
    #[error("the resource key {start:?}… has {bytes} bytes; at most {MAX_KEY_BYTES} are allowed")]
    TooLong {
        /// How the key begins.
        start: String,
        /// Its length in bytes.
        bytes: usize,
    },
    /// The text contains a NUL character.
    #[error("the resource key {0:?} contains a NUL character")]
    Nul(String),
}

impl ResourceKey {
    /// Checks that `text` can be a key.
    ///
    /// # Errors
    /// [`InvalidKey`] when the text is empty, longer than [`MAX_KEY_BYTES`] or contains NUL.
    pub fn parse(text: impl AsRef<str>) -> Result<Self, InvalidKey> {
        let text = text.as_ref();
        if text.is_empty() {
            Err(InvalidKey::Empty)
        } else if text.len() > MAX_KEY_BYTES {
            let start = text.chars().take(32).collect();
            Err(InvalidKey::TooLong { start, bytes: text.len() })
        } else if text.contains('\0') {
            Err(InvalidKey::Nul(text.to_owned()))
        } else {
            Ok(Self(text.into()))
        }
    }

    /// The key as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The partition of this key among `partitions` (at least one).
    ///
    /// The hash is FNV-1a with 64 bits: it must be the same in every version of every client.
    #[must_use]
    pub fn partition(&self, partitions: u16) -> Partition {
        if partitions <= 1 {
            return Partition(0);
        }
        let hash = self.0.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let index = hash % u64::from(partitions);
        Partition(u16::try_from(index).unwrap_or(u16::MAX))
    }
}

impl AsRef<str> for ResourceKey {
    fn as_ref(&self) -> &str {
        self.as_str()
    }
}

impl fmt::Debug for ResourceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

impl fmt::Display for ResourceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl TryFrom<String> for ResourceKey {
    type Error = InvalidKey;

    fn try_from(text: String) -> Result<Self, InvalidKey> {
        Self::parse(text)
    }
}

impl From<ResourceKey> for String {
    fn from(key: ResourceKey) -> Self {
        key.0.as_ref().to_owned()
    }
}

/// A part of the lock service whose keys are decided on together, in one atomic step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Partition(pub u16);

impl fmt::Display for Partition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Alone on a key, or together with other readers.
// exhaustive: the grant rules know exactly these two, and so may every match.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Any number of shared holders at once.
    Shared,
    /// One holder, and nobody beside it.
    Exclusive,
}

impl Mode {
    /// Whether two different owners may not hold one key in these modes at once.
    #[must_use]
    pub fn conflicts(self, other: Mode) -> bool {
        self == Mode::Exclusive || other == Mode::Exclusive
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mode::Shared => "shared",
            Mode::Exclusive => "exclusive",
        })
    }
}

/// One key and the mode in which it is wanted or held.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Want {
    /// What.
    pub key: ResourceKey,
    /// How.
    pub mode: Mode,
}

impl Want {
    /// A wish for `key` in `mode`.
    #[must_use]
    pub fn new(key: ResourceKey, mode: Mode) -> Self {
        Self { key, mode }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_never_moves_between_versions() {
        let key = ResourceKey::parse("account:alice").unwrap();
        assert_eq!(key.partition(128), Partition(66));
        assert_eq!(key.partition(1), Partition(0));
    }

    #[test]
    fn keys_with_braces_spaces_and_any_script_are_keys() {
        for text in ["a{b}c", "two words", "ключ", "鍵", "}{", "a\nb"] {
            assert_eq!(ResourceKey::parse(text).unwrap().as_str(), text);
        }
    }

    #[test]
    fn a_bad_key_is_named_in_the_error() {
        assert!(ResourceKey::parse("a\0b").unwrap_err().to_string().contains("a\\0b"));
        assert!(ResourceKey::parse("x".repeat(512)).is_ok());
        let long = ResourceKey::parse("x".repeat(513)).unwrap_err();
        assert!(long.to_string().contains("513"), "{long}");
    }
}
