//! What a session is called while it has a branch open.
//!
//! `application_name` is seen by everybody while a transaction is open, costs nothing to set, and
//! has 63 bytes. So it carries what others have to know of the commonest branches: few keys, all of
//! them exclusive, with one token. What does not fit stands in `palisade_branch`, whose row costs a
//! transaction of its own.
//!
//! ```text
//! palisade:92c1d45f00ab37e8:owner______token____key__key__key__
//! ```
//!
//! Behind the colon are the last 16 digits of the attempt's UUID, so that operators find it; then
//! numbers in 64 digits that sort as the numbers do: 64 bits made of the owner, the token, and 30
//! bits of a hash of each key. Two keys that look alike cost somebody a retry.

use super::Published;

/// The most keys that fit.
const KEYS: usize = 3;

const DIGITS: &[u8; 64] = b"-0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz";

/// How the names of all branches of one attempt begin.
pub(crate) fn start(attempt: uuid::Uuid) -> String {
    format!("palisade:{:016x}", attempt.as_u64_pair().1)
}

/// The name, if all that is to be published fits into it.
pub(crate) fn full(branch: &Published) -> Option<String> {
    let (_, _, first) = branch.keys.first()?;
    let alike = branch.keys.iter().all(|(_, exclusive, token)| *exclusive && token == first);
    if !alike || branch.keys.len() > KEYS {
        return None;
    }
    let keys: String = branch.keys.iter().map(|(hex, _, _)| key(hex)).collect();
    let (owner, token) = (owner(branch.owner), token(*first));
    Some(format!("{}:{owner}{token}{keys}", start(branch.attempt)))
}

/// An owner in a name.
pub(crate) fn owner(owner: uuid::Uuid) -> String {
    let (high, low) = owner.as_u64_pair();
    digits(high.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ low, 11)
}

/// A token in a name.
pub(crate) fn token(token: i64) -> String {
    digits(token.unsigned_abs(), 9)
}

/// A key in a name, made from the key in hex. The hash is FNV-1a.
pub(crate) fn key(hex: &str) -> String {
    let hash = hex.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    digits(hash >> 34, 5)
}

/// A number in so many digits, the highest first.
fn digits(number: u64, count: u32) -> String {
    let digit = |place: u32| {
        let index = usize::try_from(number.checked_shr(6 * place).unwrap_or(0) & 63).unwrap_or(0);
        char::from(DIGITS.get(index).copied().unwrap_or(b'-'))
    };
    (0..count).rev().map(digit).collect()
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::sql::postgres::hex;

    fn branch(keys: &[(&str, bool, i64)]) -> Published {
        let keys = keys.iter().map(|(key, exclusive, token)| (hex(key), *exclusive, *token));
        Published { attempt: Uuid::max(), owner: Uuid::max(), keys: keys.collect() }
    }

    #[test]
    fn what_fits_is_in_the_name_and_no_longer_than_the_server_keeps() {
        let name = full(&branch(&[("a", true, 7), ("b", true, 7), ("c", true, 7)])).unwrap();
        assert!(name.starts_with("palisade:ffffffffffffffff:"), "{name}");
        assert!(name.len() <= 63, "{name}");
        for keys in [
            &[("a", true, 7), ("b", true, 8)][..],
            &[("a", false, 7)],
            &[("a", true, 7), ("b", true, 7), ("c", true, 7), ("d", true, 7)],
            &[],
        ] {
            assert_eq!(full(&branch(keys)), None, "{keys:?}");
        }
    }

    #[test]
    fn digits_sort_as_the_numbers_do() {
        let numbers = [0, 1, 9, 10, 63, 64, 4095, 4096, 1_790_000_000_000_000, (1 << 53) - 1];
        let written: Vec<_> = numbers.iter().map(|number| token(*number)).collect();
        assert!(written.is_sorted() && written.iter().all(|text| text.len() == 9), "{written:?}");
        assert_eq!(digits(u64::MAX, 11).len(), 11);
        assert_ne!(digits(u64::MAX, 11), digits(u64::MAX >> 1, 11));
    }
}
