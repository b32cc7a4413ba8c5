//! What went wrong with Redis, in our words.

use redis::{ErrorKind as Kind, RedisError, ServerErrorKind};

use super::tls;
use crate::error::{Error, ErrorKind};

/// What a connection says that is accepted and then hears nothing.
pub(super) const NO_ANSWER: &str = "the Redis server accepts connections and does not answer";

/// Nothing of what is dangerous but one's own connection and what the server says of itself.
const PERMISSIONS: &str = "the Redis user lacks a permission; it needs ~palisade:* \
     &palisade:c:* +@read +@write +@scripting +@pubsub +@connection -@dangerous +time +info \
     +client|kill";

/// Scripts with flags came with version 7.0.
const TOO_OLD: &str = "the Redis server is too old; version 7.0 or later is needed";

pub(super) fn too_old() -> Error {
    Error::new(ErrorKind::Unavailable, "connect", TOO_OLD)
}

/// Who must not grant after a restart has to know of one.
pub(super) fn unknown_life() -> Error {
    let detail = "RedisOptions::amnesia_guard is set, and the Redis user may not ask since when \
                  the server runs; it needs +info";
    Error::new(ErrorKind::Denied, "connect", detail)
}

/// A release found nothing, after a copy of it whose answer was lost.
pub(super) fn first_copy() -> Error {
    let detail = "the answer to the release was lost, and a second one found nothing to release: \
                  the first one did it, or the lock had been lost before";
    Error::new(ErrorKind::Unavailable, "release", detail)
}

/// A call failed whose first copy was sent, and may have been carried out: no error after that is
/// the last word.
pub(super) fn after_copy(operation: &'static str, error: Error) -> Error {
    if error.is_unavailable() {
        return error;
    }
    let detail = "the answer was lost, and a second copy of the call was refused: the first one \
                  may have been carried out";
    Error::new(ErrorKind::Unavailable, operation, detail).with_source(error)
}

/// What to do about an error of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Remedy {
    /// The connection is not usable any more: take another one, then send again.
    Reconnect,
    /// The server does not know the script: send its text.
    SendText,
    /// The server is in a state that may pass: send again after a pause.
    Wait,
    /// Nothing helps.
    GiveUp,
}

pub(super) fn remedy(error: &RedisError) -> Remedy {
    match error.kind() {
        Kind::Io if tls::refusal(error).is_some() => Remedy::GiveUp,
        Kind::Io | Kind::Parse => Remedy::Reconnect,
        Kind::Server(ServerErrorKind::NoScript) => Remedy::SendText,
        // The server may have become a replica; its name may meanwhile lead to another one.
        Kind::Server(ServerErrorKind::ReadOnly) => Remedy::Reconnect,
        Kind::Server(
            ServerErrorKind::BusyLoading
            | ServerErrorKind::MasterDown
            | ServerErrorKind::TryAgain
            | ServerErrorKind::ClusterDown,
        ) => Remedy::Wait,
        _ if error.code() == Some("BUSY") => Remedy::Wait,
        _ => Remedy::GiveUp,
    }
}

/// The error that a caller sees.
pub(super) fn explain(operation: &'static str, error: RedisError) -> Error {
    if let Some(detail) = tls::refusal(&error) {
        return Error::new(ErrorKind::Denied, operation, detail).with_source(error);
    }
    let (kind, detail) = match (error.kind(), error.code().unwrap_or_default()) {
        (Kind::AuthenticationFailed, _) | (_, "NOAUTH" | "WRONGPASS") => {
            (ErrorKind::Denied, "Redis refused the user name or the password")
        }
        (_, "NOPERM") => (ErrorKind::Denied, PERMISSIONS),
        // Within a script, a missing permission is an error without a code of its own.
        (_, "ERR") if says(&error, "The user executing the script can't") => {
            (ErrorKind::Denied, PERMISSIONS)
        }
        (_, "MISCONF") => (
            ErrorKind::Unavailable,
            "Redis cannot save its data and refuses to write (MISCONF); see its log",
        ),
        (_, "OOM") => (
            ErrorKind::Unavailable,
            "Redis is out of memory and takes no new locks; raise its maxmemory",
        ),
        (_, "NOREPLICAS") if operation == "release" => (
            ErrorKind::Unavailable,
            "Redis has too few replicas in reach to write (NOREPLICAS, min-replicas-to-write); \
             the lock is left to expire",
        ),
        (_, "NOREPLICAS") => (
            ErrorKind::Unavailable,
            "Redis has too few replicas in reach to write (NOREPLICAS, min-replicas-to-write)",
        ),
        (_, "READONLY") => (ErrorKind::Unavailable, "the Redis server is a replica (READONLY)"),
        (_, "LOADING") => (ErrorKind::Unavailable, "Redis is still loading its data (LOADING)"),
        (_, "MASTERDOWN") => {
            (ErrorKind::Unavailable, "the Redis server is a replica without master (MASTERDOWN)")
        }
        (_, "BUSY") => {
            (ErrorKind::Unavailable, "Redis is busy with a script of another user (BUSY)")
        }
        (_, "TRYAGAIN") => (ErrorKind::Unavailable, "the Redis cluster moves keys (TRYAGAIN)"),
        (_, "CLUSTERDOWN") => (ErrorKind::Unavailable, "the Redis cluster is down (CLUSTERDOWN)"),
        (_, "MOVED" | "ASK" | "CROSSSLOT") => {
            (ErrorKind::InvalidInput, "this is a node of a Redis cluster, not a single server")
        }
        (_, "WRONGTYPE") => {
            (ErrorKind::Corrupt, "a key of palisade's holds a value of a foreign type")
        }
        (Kind::RESP3NotSupported, _) => (ErrorKind::Unavailable, TOO_OLD),
        (_, "ERR") if says(&error, "Error compiling script") => (ErrorKind::Unavailable, TOO_OLD),
        (Kind::Io, _) => (ErrorKind::Unavailable, "the Redis server cannot be reached"),
        (Kind::Parse | Kind::UnexpectedReturnType, _) => {
            (ErrorKind::Unavailable, "what answers is not a Redis server")
        }
        _ => (ErrorKind::Unavailable, "Redis answered with an error"),
    };
    Error::new(kind, operation, detail).with_source(error)
}

fn says(error: &RedisError, start: &str) -> bool {
    error.detail().is_some_and(|detail| detail.starts_with(start))
}

/// A value that palisade did not write stands at one of its keys.
pub(super) fn corrupt(operation: &'static str, redis_key: &str) -> Error {
    let detail = if redis_key.ends_with("}:t") {
        format!(
            "the token counter {redis_key:?} is no number of palisade's, or it or the requested \
             floor is more than a day ahead of the server's clock; it was left as it is. Check the \
             clocks and what else writes to this database, then remove the counter by hand"
        )
    } else {
        format!(
            "the Redis key {redis_key:?} holds something that palisade did not write; it was left \
             as it is. Find out what else writes to this database, then remove the key by hand"
        )
    };
    Error::new(ErrorKind::Corrupt, operation, detail)
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn a_lost_connection_is_unavailable_and_keeps_its_cause() {
        let error = RedisError::from(std::io::Error::from(std::io::ErrorKind::ConnectionReset));
        assert_eq!(remedy(&error), Remedy::Reconnect);
        let error = explain("acquire", error);
        assert!(error.is_unavailable());
        assert!(error.source().is_some());
    }

    #[test]
    fn refused_credentials_are_final() {
        let error = RedisError::from((Kind::AuthenticationFailed, "no"));
        assert_eq!(remedy(&error), Remedy::GiveUp);
        assert_eq!(explain("connect", error).kind(), ErrorKind::Denied);
    }
}
