//! Token arithmetic.

use std::time::Duration;

use crate::types::{FencingToken, MAX_AHEAD};

/// The token counter of a partition holds something that cannot be ours.
///
/// It is never overwritten: giving out tokens from a guess could repeat one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Corrupt;

/// The next token: above the last one, above `floor`, and never below the service's clock.
///
/// # Errors
/// [`Corrupt`] when the result would be 2^53 or more, or more than a day ahead of the clock: then
/// either the counter or the floor did not come from a palisade with a sane clock.
pub fn next_token(
    last: Option<FencingToken>,
    now_us: u64,
    floor: Option<FencingToken>,
) -> Result<FencingToken, Corrupt> {
    let above = |token: Option<FencingToken>| token.map_or(0, |token| token.get() + 1);
    let number = above(last).max(above(floor)).max(now_us).max(1);
    if number > now_us.saturating_add(micros(MAX_AHEAD)) {
        return Err(Corrupt);
    }
    FencingToken::new(number).ok_or(Corrupt)
}

/// How far a block of tokens may put the counter ahead of the service's clock.
///
/// A service that loses its memory starts from its clock again, so a counter that was ahead of it
/// could give out tokens twice, unless it takes longer than this to be emptied and asked.
pub const BLOCK_AHEAD: Duration = Duration::from_millis(1);

/// The last token of a grant that begins at `first` and asks for `block` of them.
///
/// A block is used up more slowly than the clock runs, but many of them in one partition might not
/// be. There is only one token where the block would end more than [`BLOCK_AHEAD`] of the clock.
#[must_use]
pub fn last_of_block(first: FencingToken, now_us: u64, block: u32) -> FencingToken {
    let last = first.get() + u64::from(block.max(1)) - 1;
    if last > now_us.saturating_add(micros(BLOCK_AHEAD)) {
        return first;
    }
    FencingToken::new(last).unwrap_or(first)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(number: u64) -> FencingToken {
        FencingToken::new(number).unwrap()
    }

    #[test]
    fn a_token_exceeds_the_last_one_the_floor_and_the_clock() {
        assert_eq!(next_token(None, 100, None), Ok(token(100)));
        assert_eq!(next_token(Some(token(100)), 100, None), Ok(token(101)));
        assert_eq!(next_token(Some(token(100)), 50, Some(token(200))), Ok(token(201)));
    }

    #[test]
    fn a_block_is_given_out_unless_it_would_run_ahead_of_the_clock() {
        let now = 5_000_000;
        let ahead = 1_000;
        assert_eq!(last_of_block(token(now), now, 256), token(now + 255));
        assert_eq!(last_of_block(token(now), now, 1), token(now));
        assert_eq!(last_of_block(token(now), now, 0), token(now), "no block is one token");
        assert_eq!(last_of_block(token(now + ahead - 1), now, 2), token(now + ahead));
        assert_eq!(last_of_block(token(now + ahead), now, 2), token(now + ahead));
        assert_eq!(last_of_block(token(now), now, 1002), token(now), "however far it begins");
        let end = FencingToken::LIMIT - 1;
        assert_eq!(last_of_block(token(end), end, 2), token(end), "tokens end at two to the 53");
    }

    #[test]
    fn a_clock_that_stepped_back_never_repeats_a_token() {
        let last = next_token(None, 5_000, None).unwrap();
        assert!(next_token(Some(last), 10, None).unwrap() > last);
    }

    #[test]
    fn a_token_more_than_a_day_ahead_or_at_two_to_the_53_is_corrupt() {
        let day = 86_400_000_000;
        assert_eq!(next_token(Some(token(day + 1)), 1, None), Err(Corrupt));
        assert!(next_token(Some(token(day)), 1, None).is_ok());
        let end = FencingToken::LIMIT - 1;
        assert_eq!(next_token(Some(token(end)), end, None), Err(Corrupt));
    }
}
