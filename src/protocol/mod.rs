//! The decisions, without the world: `(state, input, now) -> verdict`.
//!
//! Nothing here waits, reads a clock or talks to a server. Drivers and services ask these functions
//! and carry the verdicts out, so that a model checker can ask them the same questions.

mod admission;
mod backoff;
mod breaker;
mod queue;
mod renewal;
mod request;
mod suspension;
mod token;

pub use admission::{Admission, Standing, admit};
pub use backoff::Backoff;
pub use breaker::{Breaker, BreakerOptions, BreakerState, Refused, Ticket};
pub use queue::{Followed, HandOver, Queue, Rules, TOMBSTONE};
pub use renewal::Renewals;
pub use request::{
    Acquire, Acquired, Grant, Holder, Inspection, Part, Released, Renewal, Renewed, Waiter,
};
pub use suspension::Suspensions;
pub use token::{BLOCK_AHEAD, Corrupt, last_of_block, next_token};
