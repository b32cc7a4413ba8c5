//! The same faults under the lock service.
