//! The checker itself, on histories whose verdict is known.

use super::checker::{Operation, check};
use super::models::{Acquired, Act, Model, Released};

use Acquired::{Busy, Granted, LimitReached};

const RE_ENTRANT: Model = Model { limit: 3, fenced: true, copies: false };
const PLAIN: Model = Model { limit: 1, fenced: true, copies: false };

fn acquire(owner: usize, entry: usize, answer: Acquired) -> Act {
    Act::Acquire { owner, entry, answer }
}

fn release(owner: usize, entry: usize) -> Act {
    Act::Release { owner, entry, answer: Released::Done }
}

fn gone(owner: usize, entry: usize) -> Act {
    Act::Release { owner, entry, answer: Released::Gone }
}

/// From when, and until when: `None` is never.
fn at(invoked: u128, returned: impl Into<Option<u128>>, act: Act) -> Operation {
    Operation { act, invoked, returned: returned.into() }
}

/// One after the other.
fn sequence(acts: impl IntoIterator<Item = Act>) -> Vec<Operation> {
    let numbered = (0..).step_by(2).zip(acts);
    numbered.map(|(time, act)| at(time, time + 1, act)).collect()
}

fn accepts(model: Model, history: &[Operation]) {
    check(model, history).unwrap_or_else(|violation| panic!("{violation}"));
}

/// Refused, because of the last operation that was answered.
fn refuses(model: Model, history: &[Operation]) {
    let violation = check(model, history).unwrap_err();
    let last = history.iter().max_by_key(|operation| operation.returned).unwrap();
    assert_eq!(violation.operation.act, last.act, "{violation}");
}

#[test]
fn who_takes_turns_enters_again_and_releases_in_any_order_is_right() {
    accepts(
        RE_ENTRANT,
        &sequence([
            acquire(1, 10, Granted(5)),
            acquire(1, 11, Granted(5)),
            acquire(2, 20, Busy),
            Act::Inspect(Some((1, 2, 5))),
            release(1, 10),
            acquire(1, 12, Granted(5)),
            acquire(1, 13, Granted(5)),
            acquire(1, 14, LimitReached),
            release(1, 13),
            release(1, 11),
            release(1, 12),
            Act::Inspect(None),
            acquire(2, 21, Granted(6)),
            release(2, 21),
        ]),
    );
}

#[test]
fn what_overlaps_may_have_happened_in_any_order() {
    // The second is granted while the first one's release is under way, and a third looks at both.
    let history = [
        at(0, 1, acquire(1, 10, Granted(5))),
        at(2, 9, release(1, 10)),
        at(3, 5, acquire(2, 20, Granted(6))),
        at(3, 8, Act::Inspect(Some((1, 1, 5)))),
        at(3, 8, acquire(3, 30, Busy)),
        at(6, 7, Act::Inspect(Some((2, 1, 6)))),
    ];
    accepts(RE_ENTRANT, &history);
    // Not so when the release had not begun.
    let mut late = history.to_vec();
    late[1].invoked = 6;
    assert!(check(RE_ENTRANT, &late).is_err());
}

#[test]
fn two_holders_are_refused() {
    for model in [RE_ENTRANT, PLAIN, Model { fenced: false, ..PLAIN }] {
        refuses(model, &sequence([acquire(1, 10, Granted(5)), acquire(2, 20, Granted(6))]));
    }
}

#[test]
fn a_token_that_does_not_grow_is_refused_where_tokens_count() {
    for token in [4, 5] {
        let history =
            sequence([acquire(1, 10, Granted(5)), release(1, 10), acquire(2, 20, Granted(token))]);
        refuses(PLAIN, &history);
        accepts(Model { fenced: false, ..PLAIN }, &history);
    }
}

#[test]
fn a_token_that_changes_within_is_refused() {
    refuses(RE_ENTRANT, &sequence([acquire(1, 10, Granted(5)), acquire(1, 11, Granted(6))]));
    refuses(RE_ENTRANT, &sequence([acquire(1, 10, Granted(5)), Act::Inspect(Some((1, 1, 6)))]));
}

#[test]
fn a_lock_that_is_not_re_entrant_is_not_entered_twice() {
    refuses(PLAIN, &sequence([acquire(1, 10, Granted(5)), acquire(1, 11, Granted(5))]));
    accepts(PLAIN, &sequence([acquire(1, 10, Granted(5)), acquire(1, 11, LimitReached)]));
    refuses(PLAIN, &sequence([acquire(1, 10, LimitReached)]));
}

#[test]
fn a_release_by_one_who_is_not_the_owner_is_refused() {
    refuses(RE_ENTRANT, &sequence([acquire(1, 10, Granted(5)), release(2, 10)]));
    refuses(RE_ENTRANT, &sequence([acquire(1, 10, Granted(5)), release(2, 20)]));
    refuses(RE_ENTRANT, &sequence([release(1, 10)]));
}

#[test]
fn a_wrong_count_is_refused() {
    let twice = [acquire(1, 10, Granted(5)), acquire(1, 11, Granted(5))];
    for count in [1, 3] {
        let seen = Act::Inspect(Some((1, count, 5)));
        refuses(RE_ENTRANT, &sequence(twice.clone().into_iter().chain([seen])));
    }
    // A second release of one entry does not stand for the other.
    let releases = [release(1, 10), release(1, 10)];
    refuses(RE_ENTRANT, &sequence(twice.clone().into_iter().chain(releases)));
    // Released once of two: not free.
    let early = [release(1, 10), acquire(2, 20, Granted(6))];
    refuses(RE_ENTRANT, &sequence(twice.into_iter().chain(early)));
}

#[test]
fn refused_though_free_is_refused() {
    refuses(RE_ENTRANT, &sequence([acquire(1, 10, Busy)]));
    let own = [acquire(1, 10, Granted(5)), acquire(1, 11, Busy)];
    refuses(RE_ENTRANT, &sequence(own));
}

#[test]
fn an_unknown_acquire_may_have_happened_or_not_and_at_any_later_time() {
    let unknown = at(0, None, acquire(1, 10, Acquired::Unknown));
    let cancel = at(1, None, Act::Release { owner: 1, entry: 10, answer: Released::Unknown });
    for other in [
        vec![at(2, 3, acquire(2, 20, Granted(6)))],
        vec![at(2, 3, acquire(2, 20, Busy)), at(4, 5, acquire(2, 21, Granted(6)))],
        vec![at(2, 3, Act::Inspect(None)), at(4, 5, Act::Inspect(Some((1, 1, 6))))],
        vec![at(2, 3, acquire(1, 11, Granted(7))), at(4, 5, Act::Inspect(Some((1, 2, 7))))],
    ] {
        let history = [vec![unknown.clone(), cancel.clone()], other].concat();
        accepts(RE_ENTRANT, &history);
    }
    // Once: it cannot come back after it was cancelled.
    let twice = [
        unknown,
        cancel,
        at(2, 3, Act::Inspect(Some((1, 1, 6)))),
        at(4, 5, Act::Inspect(None)),
        at(6, 7, Act::Inspect(Some((1, 1, 6)))),
    ];
    refuses(RE_ENTRANT, &twice);
}

#[test]
fn a_look_at_an_unknown_grant_is_not_taken_for_the_only_explanation() {
    // Owner 1 may hold by its unknown request, and is seen with a token: that of another one, which
    // is granted while the look is under way.
    let history = [
        at(0, None, acquire(1, 10, Acquired::Unknown)),
        at(0, None, Act::Release { owner: 1, entry: 10, answer: Released::Unknown }),
        at(1, 9, Act::Inspect(Some((1, 1, 7)))),
        at(2, 3, acquire(2, 20, Granted(6))),
        at(4, 5, release(2, 20)),
        at(6, 7, acquire(1, 11, Granted(7))),
        at(10, 11, acquire(2, 21, Busy)),
    ];
    accepts(RE_ENTRANT, &history);
}

#[test]
fn an_unknown_that_must_have_happened_binds_what_follows() {
    // The release has no answer, but the next grant shows that it took effect ...
    let unknown = Act::Release { owner: 1, entry: 10, answer: Released::Unknown };
    let history = vec![
        at(0, 1, acquire(1, 10, Granted(5))),
        at(2, None, unknown),
        at(4, 5, acquire(2, 20, Granted(6))),
    ];
    accepts(RE_ENTRANT, &history);
    // ... so it is not there to release any more, nor to be seen.
    for impossible in [release(1, 10), Act::Inspect(Some((1, 1, 5)))] {
        refuses(RE_ENTRANT, &[history.clone(), vec![at(6, 7, impossible)]].concat());
    }
    // And nothing takes effect before it was asked for.
    let mut late = history;
    late[1].invoked = 6;
    assert!(check(RE_ENTRANT, &late).is_err());
}

#[test]
fn a_lease_runs_out_no_earlier_than_it_may() {
    let history = |lapses| {
        [
            at(0, 1, acquire(1, 10, Granted(5))),
            at(lapses, None, Act::Lapse { entry: 10 }),
            at(10, 11, acquire(2, 20, Granted(6))),
            at(12, 13, gone(1, 10)),
        ]
    };
    accepts(RE_ENTRANT, &history(9));
    assert!(check(RE_ENTRANT, &history(12)).is_err());
}

#[test]
fn a_release_that_finds_nothing_is_explained_by_a_copy_only_where_there_are_copies() {
    let history = sequence([acquire(1, 10, Granted(5)), gone(1, 10), Act::Inspect(None)]);
    accepts(Model { copies: true, ..RE_ENTRANT }, &history);
    assert!(check(RE_ENTRANT, &history).is_err());
}
