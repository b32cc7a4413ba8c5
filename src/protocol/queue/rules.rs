//! Wrong rules, to be caught.

/// Loosened grant rules, each of which breaks a promise. All off is what is decided.
///
/// They exist so that a model checker can show that it would notice: a check that passes with any
/// of them on proves nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Rules {
    /// Incremental requests join the line when the client says so.
    pub incremental_waits: bool,
    /// Incremental requests stand behind waiters.
    pub incremental_behind_waiters: bool,
    /// Re-entry stands behind waiters.
    pub re_entry_behind_waiters: bool,
    /// Shared to exclusive waits instead of being refused.
    pub upgrade_waits: bool,
    /// Promotion stops at the first waiter that it cannot grant.
    pub promotion_stops_at_blocked: bool,
    /// A release promotes only when the last entry of its owner goes.
    pub promotes_on_last_entry_only: bool,
    /// A cancel does not promote.
    pub cancel_does_not_promote: bool,
    /// A lapse does not promote.
    pub lapse_does_not_promote: bool,
    /// A waiter stands in line on its first key only.
    pub first_key_only: bool,
}
