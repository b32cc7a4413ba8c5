//! How far a branch has come, and what it may do next. Decides; does no I/O.

use crate::error::{Error, ErrorKind};
use crate::sql::Failed;

/// The state of one branch.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// How many savepoints are open.
    depth: u32,
    /// The first failure since it was last cleared, with the depth at which it happened.
    failure: Option<(u32, Failed)>,
    /// The outermost savepoint that must be rolled back before anything else.
    abandoned: Option<u32>,
    /// A stream holds the connection, or stands in line for it.
    streaming: bool,
    /// Whether statements are refused.
    closed: bool,
    /// A commit was started; if it never came back, nobody knows how it ended.
    committing: bool,
}

impl Progress {
    /// Whether a statement may be sent now.
    pub(super) fn admit(&self, ours: bool) -> Result<(), Error> {
        if self.closed {
            let detail = "the transaction has ended; no statement can follow";
            return Err(Error::new(ErrorKind::Misuse, "statement", detail));
        }
        if self.streaming && !ours {
            return Err(open_stream("statement"));
        }
        match &self.failure {
            Some((_, failed)) => {
                let detail = "an earlier statement failed; the transaction can only roll back";
                let source = failed.clone();
                Err(Error::new(ErrorKind::Aborted, "statement", detail).with_source(source))
            }
            None => Ok(()),
        }
    }

    /// Notes a failure, unless an earlier one is known.
    pub(super) fn fail(&mut self, failed: Failed) {
        let depth = if failed.is_fatal() { 0 } else { self.depth };
        match &self.failure {
            Some((known, _)) if *known <= depth => {}
            _ => self.failure = Some((depth, failed)),
        }
    }

    /// Notes a failure that no savepoint can undo.
    pub(super) fn fail_for_good(&mut self, failed: Failed) {
        if !matches!(self.failure, Some((0, _))) {
            self.failure = Some((0, failed));
        }
    }

    pub(super) fn failure(&self) -> Option<&Failed> {
        self.failure.as_ref().map(|(_, failed)| failed)
    }

    /// A savepoint was set; or an inner one was released.
    pub(super) fn set_depth(&mut self, depth: u32) {
        self.depth = depth;
    }

    /// Everything since the savepoint is undone, and the savepoint gone.
    pub(super) fn undone(&mut self, depth: u32) {
        self.depth = self.depth.min(depth.saturating_sub(1));
        if self.abandoned.is_some_and(|abandoned| abandoned >= depth) {
            self.abandoned = None;
        }
        self.clear_failure(depth);
    }

    /// The savepoint must be rolled back before anything else; what failed in it no longer counts.
    pub(super) fn abandon(&mut self, depth: u32) {
        if depth <= self.depth {
            self.abandoned = Some(self.abandoned.map_or(depth, |other| other.min(depth)));
            self.clear_failure(depth);
        }
    }

    pub(super) fn abandoned(&self) -> Option<u32> {
        self.abandoned
    }

    /// Claims the connection for a stream.
    pub(super) fn start_stream(&mut self) {
        self.streaming = true;
    }

    pub(super) fn end_stream(&mut self) {
        self.streaming = false;
    }

    pub(super) fn is_streaming(&self) -> bool {
        self.streaming
    }

    pub(super) fn close(&mut self) {
        self.closed = true;
    }

    pub(super) fn start_commit(&mut self) {
        self.closed = true;
        self.committing = true;
    }

    pub(super) fn is_committing(&self) -> bool {
        self.committing
    }

    fn clear_failure(&mut self, depth: u32) {
        if self.failure.as_ref().is_some_and(|(at, failed)| *at >= depth && !failed.is_fatal()) {
            self.failure = None;
        }
    }
}

/// A branch is one connection, and a stream of it is still open.
pub(super) fn open_stream(operation: &'static str) -> Error {
    Error::new(
        ErrorKind::Misuse,
        operation,
        "a stream of this branch is still open, and a branch is one connection; \
         read the stream to its end, drop it, or use fetch_all",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fatal() -> Failed {
        Failed::of(&sqlx::Error::WorkerCrashed)
    }

    #[test]
    fn a_failure_within_a_savepoint_goes_with_it() {
        let mut progress = Progress::default();
        progress.set_depth(1);
        progress.fail(Failed::cancelled());
        assert_eq!(progress.admit(false).unwrap_err().kind(), ErrorKind::Aborted);
        progress.undone(1);
        assert!(progress.admit(false).is_ok());
        progress.fail(Failed::cancelled());
        progress.undone(1);
        assert!(progress.failure().is_some(), "it happened outside");
    }

    #[test]
    fn a_lost_session_is_not_cured_by_a_savepoint() {
        let mut progress = Progress::default();
        progress.set_depth(2);
        progress.fail(fatal());
        progress.undone(1);
        assert!(progress.failure().is_some());
    }

    #[test]
    fn the_outermost_abandoned_savepoint_counts() {
        let mut progress = Progress::default();
        progress.set_depth(3);
        progress.abandon(3);
        progress.abandon(2);
        assert_eq!(progress.abandoned(), Some(2));
        progress.undone(2);
        assert_eq!(progress.abandoned(), None);
        progress.abandon(2);
        assert_eq!(progress.abandoned(), None, "it is gone already");
    }

    #[test]
    fn an_open_stream_refuses_statements_but_not_its_own() {
        let mut progress = Progress::default();
        progress.start_stream();
        assert_eq!(progress.admit(false).unwrap_err().kind(), ErrorKind::Misuse);
        assert!(progress.admit(true).is_ok());
        progress.end_stream();
        assert!(progress.admit(false).is_ok());
    }
}
