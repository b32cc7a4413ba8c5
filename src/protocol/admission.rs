//! The client's half of the grant rule: what an owner may ask for, given what it holds elsewhere.
//!
//! The service decides about one partition. Whether *waiting* there can close a circle depends on
//! what the owner holds and waits for in other partitions, and only the client that made the owner
//! knows that. The rules (model-checked with those of the queue):
//!
//! - One waiting request per owner. While it waits, its owner gets re-entry and no new key
//!   anywhere.
//! - A request may stand in line only if everything its owner holds lies in *lower partitions*;
//!   then it is decided as a fresh one there. Else it is incremental: tried, never queued.
//! - An incremental request may be tried again only if its new keys sort, by (partition, key),
//!   after all that its owner holds; else it would wait for somebody who may wait for it.
//! - A mix of held and new keys is asked for in two calls.
//! - An owner of another client may re-enter or try, because its books are kept there.

use crate::types::{Mode, Partition, Want};

/// How the service treats a request: by what its owner holds in the partition.
// exhaustive: the grant rule has exactly these two cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Standing {
    /// The owner holds nothing in the partition: the request respects the line and may join it.
    Fresh,
    /// The owner holds something there: the request passes all waiters and never joins the line.
    Incremental,
}

/// What the client does with a request of one owner.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Admission {
    /// Ask the service.
    Ask {
        /// As what.
        standing: Standing,
        /// Whether the request may stand in line.
        queue: bool,
        /// Whether a refused request may be tried again until its deadline.
        retry: bool,
    },
    /// Ask twice: first for the keys the owner holds already, then for the others.
    Split {
        /// What the owner re-enters.
        held: Vec<Want>,
        /// What is new.
        new: Vec<Want>,
    },
    /// The owner holds this key shared and asks for it exclusively. Declare it exclusive.
    Upgrade(Want),
    /// The owner has a request that waits: nothing new until that is decided.
    Waiting,
}

/// Decides about the `wants` of one partition, sorted by key.
///
/// `held` lists, sorted, what the owner holds everywhere: for a key that it entered several times,
/// the strongest mode. `waiting` says whether another request of the owner waits or backs off.
/// `local` says whether this client made the owner.
#[must_use]
pub fn admit(
    partition: Partition,
    wants: &[Want],
    held: &[(Partition, Want)],
    waiting: bool,
    local: bool,
) -> Admission {
    let mode_held = |want: &Want| -> Option<Mode> {
        let same = held.iter().find(|(at, have)| *at == partition && have.key == want.key);
        same.map(|(_, have)| have.mode)
    };
    if let Some(upgrade) =
        wants.iter().find(|want| mode_held(want) < Some(want.mode) && mode_held(want).is_some())
    {
        return Admission::Upgrade(upgrade.clone());
    }
    let old = wants.iter().filter(|want| mode_held(want).is_some()).count();
    if old == wants.len() {
        return Admission::Ask { standing: Standing::Incremental, queue: false, retry: false };
    }
    if waiting {
        return Admission::Waiting;
    }
    if old > 0 {
        let (held, new) = wants.iter().cloned().partition(|want| mode_held(want).is_some());
        return Admission::Split { held, new };
    }
    if !local {
        return Admission::Ask { standing: Standing::Fresh, queue: false, retry: false };
    }
    if held.iter().all(|(at, _)| *at < partition) {
        return Admission::Ask { standing: Standing::Fresh, queue: true, retry: true };
    }
    let here = held.iter().any(|(at, _)| *at == partition);
    let sorted = held.iter().all(|(at, have)| {
        wants.first().is_some_and(|want| (*at, &have.key) < (partition, &want.key))
    });
    let standing = if here { Standing::Incremental } else { Standing::Fresh };
    Admission::Ask { standing, queue: false, retry: sorted }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::ResourceKey;

    fn want(key: &str) -> Want {
        Want::new(ResourceKey::parse(key).unwrap(), Mode::Exclusive)
    }

    fn ask(standing: Standing, queue: bool, retry: bool) -> Admission {
        Admission::Ask { standing, queue, retry }
    }

    const P0: Partition = Partition(0);
    const P1: Partition = Partition(1);

    #[test]
    fn an_owner_that_holds_nothing_stands_in_line() {
        assert_eq!(admit(P0, &[want("a")], &[], false, true), ask(Standing::Fresh, true, true));
    }

    #[test]
    fn an_owner_that_holds_only_lower_partitions_stands_in_line() {
        let held = [(P0, want("z"))];
        assert_eq!(admit(P1, &[want("a")], &held, false, true), ask(Standing::Fresh, true, true));
    }

    #[test]
    fn a_new_key_is_retried_only_when_it_sorts_after_all_that_is_held() {
        let held = [(P0, want("b"))];
        assert_eq!(
            admit(P0, &[want("c")], &held, false, true),
            ask(Standing::Incremental, false, true)
        );
        assert_eq!(
            admit(P0, &[want("a")], &held, false, true),
            ask(Standing::Incremental, false, false)
        );
        let above = [(P1, want("a"))];
        assert_eq!(
            admit(P0, &[want("z")], &above, false, true),
            ask(Standing::Fresh, false, false)
        );
    }

    #[test]
    fn while_an_owner_waits_it_gets_re_entry_and_nothing_new_anywhere() {
        let held = [(P0, want("a"))];
        assert_eq!(
            admit(P0, &[want("a")], &held, true, true),
            ask(Standing::Incremental, false, false)
        );
        assert_eq!(admit(P1, &[want("b")], &held, true, true), Admission::Waiting);
    }

    #[test]
    fn held_and_new_keys_are_asked_for_apart() {
        let held = [(P0, want("a"))];
        let split = Admission::Split { held: vec![want("a")], new: vec![want("b")] };
        assert_eq!(admit(P0, &[want("a"), want("b")], &held, false, true), split);
    }

    #[test]
    fn shared_to_exclusive_is_refused_and_exclusive_to_shared_is_re_entry() {
        let shared = Want { mode: Mode::Shared, ..want("a") };
        let up = admit(P0, &[want("a")], &[(P0, shared.clone())], false, true);
        assert_eq!(up, Admission::Upgrade(want("a")));
        let down = admit(P0, &[shared], &[(P0, want("a"))], false, true);
        assert_eq!(down, ask(Standing::Incremental, false, false));
    }

    #[test]
    fn an_owner_of_another_client_may_only_try() {
        assert_eq!(admit(P0, &[want("a")], &[], false, false), ask(Standing::Fresh, false, false));
    }
}
