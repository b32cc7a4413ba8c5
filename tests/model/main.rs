//! The grant rules, model-checked with stateright.
//!
//! What is checked is the production code: [`palisade::protocol::Queue`] is the service and
//! [`palisade::protocol::admit`] is the client's half of the rules. The model adds what is around
//! them: clients that ask part by part as `lock/service.rs` does, crashes, leases that lapse, and a
//! network that loses, delays and repeats messages. Clients are alike, so states are counted up to
//! renaming them.
//!
//! | file | knows |
//! |---|---|
//! | `world.rs` | what is modelled, and the state between two steps |
//! | `client.rs` | what a client does |
//! | `service.rs` | calls to the queue, and promises that an answer may break |
//! | `sloppy.rs` | `admit`, and ways to get it wrong |
//! | `drain.rs` | the end: does everyone get its turn, and is nothing left? |
//! | `code.rs` | the canonical form of a state |
//! | `check.rs` | steps and properties as stateright wants them |
//! | `loosened.rs` | wrong rules, each of which must be caught |
//!
//! Every run prints its size. They are bounded, and most of the larger ones are cut off; with
//! `PALISADE_MODEL_SECONDS=200` each run goes on for that long, with some 10 to 20 MB of memory for
//! each second. Then `one-key-deep` (159 109 states), `two-keys` (87 124), `two-keys-lapse` (126
//! 658) and `three-keys` (96 310) are complete, too.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    unreachable_pub,
    reason = "a test panics to fail, and nobody imports it"
)]

mod check;
mod client;
mod code;
mod drain;
mod loosened;
mod service;
mod sloppy;
mod world;

use palisade::Mode::{Exclusive as X, Shared as S};
use world::{Faults, Process, World};

/// Clients may have several orders at once, and give up.
const CALM: Faults = Faults {
    concurrent: true,
    give_up: true,
    crash: false,
    live_lapse: false,
    lazy: false,
    lost_replies: false,
    late_pushes: false,
    copies: false,
    slow_settle: false,
};

/// Everything at once.
const STORM: Faults = Faults {
    concurrent: true,
    give_up: true,
    crash: true,
    live_lapse: true,
    lazy: true,
    lost_replies: true,
    late_pushes: true,
    copies: true,
    slow_settle: true,
};

/// Explores about `most` transitions; at least `floor` states must have been seen.
fn holds(mut world: World, orders: usize, faults: Faults, most: usize, floor: usize) {
    world.faults = faults;
    world.orders = orders;
    world.run(most, None).holds(floor);
}

#[test]
fn one_key_that_is_entered_three_times_by_each_keeps_every_promise() {
    let faults = Faults { crash: true, live_lapse: true, lost_replies: true, ..CALM };
    holds(World::new("one-key-deep", 1, &[S, X], 1), 3, faults, 120_000, 8_000);
}

#[test]
fn one_key_keeps_every_promise_in_a_storm() {
    holds(World::new("one-key-storm", 1, &[S, X], 1), 2, STORM, 100_000, 15_000);
}

#[test]
fn one_key_keeps_every_promise_while_answers_and_releases_are_late() {
    let faults = Faults { slow_settle: true, lost_replies: true, ..CALM };
    holds(World::new("one-key-late", 1, &[S, X], 1), 2, faults, 100_000, 10_000);
}

#[test]
fn two_keys_in_both_modes_keep_every_promise() {
    holds(World::new("two-keys", 2, &[S, X], 2), 2, CALM, 100_000, 10_000);
}

#[test]
fn two_keys_keep_every_promise_while_clients_die_and_leases_lapse() {
    let faults = Faults { crash: true, live_lapse: true, ..CALM };
    holds(World::new("two-keys-lapse", 2, &[X], 2), 2, faults, 120_000, 8_000);
}

#[test]
fn two_keys_keep_every_promise_while_releases_are_late_and_lapses_unnoticed() {
    let faults = Faults { slow_settle: true, lazy: true, ..CALM };
    holds(World::new("two-keys-late", 2, &[X], 2), 1, faults, 100_000, 15_000);
}

#[test]
fn two_keys_keep_every_promise_in_a_storm() {
    holds(World::new("two-keys-storm", 2, &[S, X], 2), 1, STORM, 100_000, 20_000);
}

#[test]
fn three_keys_keep_every_promise() {
    holds(World::new("three-keys", 3, &[X], 3), 2, CALM, 120_000, 12_000);
}

#[test]
fn sets_across_two_partitions_keep_every_promise() {
    let world = World::new("wide-three-keys", 3, &[X], 3).across(&[0, 1, 1]);
    holds(world, 2, CALM, 400_000, 20_000);
}

#[test]
fn sets_in_both_modes_whose_partitions_are_not_in_key_order_keep_every_promise() {
    let world = World::new("wide-two-keys", 2, &[S, X], 2).across(&[1, 0]);
    holds(world, 2, CALM, 400_000, 15_000);
}

#[test]
fn sets_across_two_partitions_keep_every_promise_in_a_storm() {
    let world = World::new("wide-storm", 2, &[S, X], 2).across(&[0, 1]);
    holds(world, 1, STORM, 100_000, 20_000);
}

#[test]
fn an_owner_whose_id_was_sent_to_another_process_keeps_every_promise() {
    let mut world = World::new("foreign", 2, &[S, X], 2);
    world.processes[1] = Process { owner: 0, local: false };
    holds(world, 2, CALM, 100_000, 10_000);
}

#[test]
fn an_owner_in_two_processes_keeps_every_promise_across_partitions() {
    let mut world = World::new("foreign-wide", 2, &[S, X], 2).across(&[0, 1]);
    world.processes[1] = Process { owner: 0, local: false };
    holds(world, 2, CALM, 100_000, 10_000);
}
