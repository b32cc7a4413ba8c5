//! Transactions over fenced locks.
