//! Fencing tokens.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How far ahead of the service's clock a token may be before it is refused.
///
/// A counter that was overwritten with a huge number would otherwise end the supply of tokens.
pub const MAX_AHEAD: Duration = Duration::from_secs(24 * 60 * 60);

/// A number that only grows per key, checked by the store before anything is changed.
///
/// It is the service's clock in microseconds where that is above every token given out before, so
/// that it keeps growing when the service loses its memory. Tokens stay below 2^53, because Lua
/// counts in doubles; at one token per microsecond that lasts until the year 2255.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct FencingToken(u64);

/// The number is no token: tokens are in `1..2^53`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is no fencing token: tokens are above 0 and below 2^53")]
pub struct InvalidToken(pub u64);

impl FencingToken {
    /// The first number that is no token any more.
    pub const LIMIT: u64 = 1 << 53;

    /// The lowest token. A store that has seen none accepts it.
    pub const FIRST: Self = Self(1);

    /// The token with this number, if it is in `1..2^53`.
    #[must_use]
    pub fn new(number: u64) -> Option<Self> {
        (1..Self::LIMIT).contains(&number).then_some(Self(number))
    }

    /// The token as a number.
    #[must_use]
    pub fn get(self) -> u64 {
        self.0
    }
}

impl TryFrom<u64> for FencingToken {
    type Error = InvalidToken;

    fn try_from(number: u64) -> Result<Self, InvalidToken> {
        Self::new(number).ok_or(InvalidToken(number))
    }
}

impl From<FencingToken> for u64 {
    fn from(token: FencingToken) -> Self {
        token.0
    }
}

impl fmt::Debug for FencingToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl fmt::Display for FencingToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
