//! Wrong rules. The model must find a counterexample to each, or it proves nothing about the right
//! ones. The length of the shortest one is printed.

use palisade::Mode::{Exclusive as X, Shared as S};
use palisade::protocol::Rules;

use crate::CALM;
use crate::check::{FIFO, NO_DEADLOCK, PASSES, RE_ENTRY, TOKEN, WAKE_UP};
use crate::sloppy::Sloppy;
use crate::world::{Faults, Process, World};

/// No world here needs more, if its rule can be caught at all.
const MOST: usize = 1_000_000;
/// Nobody gives up: it is not needed, and traces are easier to read.
const PATIENT: Faults = Faults { give_up: false, ..CALM };

fn caught(mut world: World, faults: Faults, rules: Rules, property: &'static str) {
    (world.faults, world.rules) = (faults, rules);
    world.run(MOST, Some(property)).fails(property);
}

fn caught_client(mut world: World, sloppy: Sloppy, property: &'static str) {
    (world.faults, world.sloppy) = (PATIENT, Some(sloppy));
    world.run(MOST, Some(property)).fails(property);
}

/// The rules with one switch on; `Rules` is not exhaustive, so there is no literal of it here.
fn with(switch: impl Fn(&mut Rules) -> &mut bool) -> Rules {
    let mut rules = Rules::default();
    *switch(&mut rules) = true;
    rules
}

#[test]
fn additions_that_join_the_line_deadlock() {
    let mut world = World::new("loose-incremental-waits", 2, &[X], 2);
    world.sloppy = Some(Sloppy::AdditionQueues);
    caught(world, PATIENT, with(|rules| &mut rules.incremental_waits), NO_DEADLOCK);
}

#[test]
fn additions_that_ask_to_join_the_line_are_refused_by_the_service_and_harmless() {
    let mut world = World::new("strict-incremental-waits", 2, &[X], 2);
    (world.faults, world.sloppy) = (PATIENT, Some(Sloppy::AdditionQueues));
    world.run(MOST, None).holds(300);
}

#[test]
fn additions_behind_waiters_are_noticed() {
    let rules = with(|rules| &mut rules.incremental_behind_waiters);
    caught(World::new("loose-incremental-behind", 2, &[X], 2), PATIENT, rules, PASSES);
}

#[test]
fn re_entry_behind_waiters_is_noticed() {
    let rules = with(|rules| &mut rules.re_entry_behind_waiters);
    caught(World::new("loose-re-entry-behind", 1, &[X], 1), PATIENT, rules, RE_ENTRY);
}

#[test]
fn upgrades_that_wait_deadlock() {
    let mut world = World::new("loose-upgrade-waits", 1, &[S, X], 1);
    world.sloppy = Some(Sloppy::UpgradeAsks);
    caught(world, PATIENT, with(|rules| &mut rules.upgrade_waits), NO_DEADLOCK);
}

#[test]
fn upgrades_in_place_keep_a_token_that_others_have_passed() {
    let mut world = World::new("loose-upgrade-token", 1, &[S, X], 1);
    world.processes[1] = Process { owner: 0, local: false };
    caught(world, PATIENT, with(|rules| &mut rules.upgrade_waits), TOKEN);
}

#[test]
fn upgrades_that_are_asked_for_are_refused_by_the_service_and_harmless() {
    let mut world = World::new("strict-upgrade-waits", 1, &[S, X], 1);
    (world.faults, world.sloppy) = (PATIENT, Some(Sloppy::UpgradeAsks));
    world.run(MOST, None).holds(30);
}

#[test]
fn promotion_that_stops_at_a_blocked_waiter_loses_a_wake_up() {
    let rules = with(|rules| &mut rules.promotion_stops_at_blocked);
    caught(World::new("loose-stops-at-blocked", 2, &[X], 2), PATIENT, rules, WAKE_UP);
}

#[test]
fn promotion_only_when_the_last_entry_goes_loses_a_wake_up() {
    let rules = with(|rules| &mut rules.promotes_on_last_entry_only);
    caught(World::new("loose-last-entry-only", 1, &[S, X], 1), PATIENT, rules, WAKE_UP);
}

#[test]
fn a_cancel_without_promotion_loses_a_wake_up() {
    let rules = with(|rules| &mut rules.cancel_does_not_promote);
    caught(World::new("loose-cancel", 1, &[S, X], 1), CALM, rules, WAKE_UP);
}

#[test]
fn a_lapse_without_promotion_loses_a_wake_up() {
    let (rules, faults) =
        (with(|rules| &mut rules.lapse_does_not_promote), Faults { crash: true, ..PATIENT });
    caught(World::new("loose-lapse", 1, &[S, X], 1), faults, rules, WAKE_UP);
}

#[test]
fn a_waiter_on_its_first_key_only_is_overtaken() {
    let rules = with(|rules| &mut rules.first_key_only);
    caught(World::new("loose-first-key-only", 2, &[X], 2), PATIENT, rules, FIFO);
}

#[test]
fn an_owner_with_two_requests_outstanding_deadlocks() {
    let world = World::new("sloppy-two-outstanding", 3, &[X], 2);
    caught_client(world, Sloppy::TwoOutstanding, NO_DEADLOCK);
}

#[test]
fn held_and_new_keys_in_one_request_that_is_retried_deadlock() {
    let mut world = World::new("sloppy-mixed", 3, &[X], 3);
    world.orders = 3;
    world.processes.truncate(2);
    caught_client(world, Sloppy::Mixed, NO_DEADLOCK);
}

#[test]
fn sets_in_partition_order_and_additions_in_key_order_deadlock() {
    let world = World::new("sloppy-two-orders", 2, &[X], 2).across(&[1, 0]);
    caught_client(world, Sloppy::TwoOrders, NO_DEADLOCK);
}

#[test]
fn waiting_without_regard_to_what_is_held_elsewhere_deadlocks() {
    let world = World::new("sloppy-held-untold", 2, &[X], 2).across(&[0, 1]);
    caught_client(world, Sloppy::HeldElsewhereUntold, NO_DEADLOCK);
}

#[test]
fn asking_without_regard_to_what_is_waited_for_elsewhere_deadlocks() {
    let world = World::new("sloppy-waits-untold", 3, &[X], 2).across(&[0, 1, 1]);
    caught_client(world, Sloppy::WaitsElsewhereUntold, NO_DEADLOCK);
}

#[test]
fn additions_that_are_retried_in_any_order_deadlock() {
    let world = World::new("sloppy-unsorted-retry", 2, &[X], 1);
    caught_client(world, Sloppy::UnsortedRetry, NO_DEADLOCK);
}

#[test]
fn an_owner_that_waits_in_a_process_that_did_not_make_it_deadlocks() {
    let mut world = World::new("sloppy-foreign-waits", 2, &[X], 1);
    world.processes[1] = Process { owner: 0, local: false };
    caught_client(world, Sloppy::ForeignWaits, NO_DEADLOCK);
}
