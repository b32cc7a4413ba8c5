//! How answers of the scripts are read. What is not exactly as expected is refused.

use std::time::Duration;

use redis::Value;

use super::failure;
use super::request::{parse_id, resource};
use crate::backend::Push;
use crate::error::{Error, ErrorKind, Result};
use crate::protocol::{
    Acquired, Followed, Grant, HandOver, Holder, Inspection, Part, Released, Renewal, Renewed,
    Waiter,
};
use crate::types::{ClientId, FencingToken, Mode, RequestId, Want};

pub(super) fn acquired(value: &Value, part: &Part) -> Result<Acquired> {
    refuse_corrupt("acquire", value)?;
    read_acquired(value, part).ok_or_else(|| unreadable("acquire", value))
}

fn read_acquired(value: &Value, part: &Part) -> Option<Acquired> {
    if let Value::Int(_) = value {
        let tokens = vec![token(integer(value)?)?; part.wants.len()];
        return Some(Acquired::Granted(Grant { request: part.request, tokens, block: 1 }));
    }
    let (tag, rest) = tagged(value)?;
    let key = |index: &Value| {
        let want: &Want = part.wants.get(usize::try_from(integer(index)?).ok()?.checked_sub(1)?)?;
        Some(want.key.clone())
    };
    Some(match (tag, rest) {
        ("granted", [tokens]) => Acquired::Granted(grant(tokens, part)?),
        ("granted", [tokens, block]) => Acquired::Granted(with_block(block, tokens, part)?),
        ("queued", [position, ask_again]) => Acquired::Queued {
            position: u32::try_from(integer(position)?).ok()?,
            ask_again_in: micros(ask_again)?,
        },
        ("busy", [index, waiters, holders @ ..]) => Acquired::Busy {
            key: key(index)?,
            holders: holders.iter().map(|id| text(id)?.parse().ok()).collect::<Option<_>>()?,
            waiters: flag(waiters)?,
        },
        ("upgrade", [index]) => Acquired::Upgrade { key: key(index)? },
        ("limit", [index]) => Acquired::LimitReached { key: key(index)? },
        ("cancelled", []) => Acquired::Cancelled,
        _ => return None,
    })
}

pub(super) fn renewed(value: &Value, renewals: &[Renewal]) -> Result<Vec<Renewed>> {
    refuse_corrupt("renew", value)?;
    let answers = match value {
        Value::Array(answers) if answers.len() == renewals.len() => answers,
        _ => return Err(unreadable("renew", value)),
    };
    let read = answers.iter().zip(renewals).map(|(answer, renewal)| {
        Some(match answer {
            Value::Int(1) => Renewed::Held(None),
            Value::Int(0) => Renewed::Lost,
            _ => match tagged(answer)? {
                ("held", [tokens, block]) => {
                    Renewed::Held(Some(with_block(block, tokens, &renewal.part)?))
                }
                ("queued", [ask_again]) => Renewed::Queued { ask_again_in: micros(ask_again)? },
                _ => return None,
            },
        })
    });
    read.collect::<Option<_>>().ok_or_else(|| unreadable("renew", value))
}

pub(super) fn released(value: &Value) -> Result<Released> {
    refuse_corrupt("release", value)?;
    match value {
        Value::Int(1) => Ok(Released::Released),
        Value::Int(0) => Ok(Released::Gone),
        _ => Err(unreadable("release", value)),
    }
}

pub(super) fn cancelled(value: &Value) -> Result<()> {
    refuse_corrupt("cancel", value)?;
    match value {
        Value::Int(1) => Ok(()),
        _ => Err(unreadable("cancel", value)),
    }
}

/// The server's clock in µs since 1970.
pub(super) fn clock(value: &Value) -> Result<u64> {
    let read = || {
        let [seconds, micros] = array(value)? else { return None };
        number(seconds)?.checked_mul(1_000_000)?.checked_add(number(micros)?)
    };
    read().ok_or_else(|| unreadable("ping", value))
}

pub(super) fn inspection(value: &Value) -> Result<Inspection> {
    refuse_corrupt("inspect", value)?;
    read_inspection(value).ok_or_else(|| unreadable("inspect", value))
}

fn read_inspection(value: &Value) -> Option<Inspection> {
    let [now, holders, waiters] = array(value)? else { return None };
    let now_us = number(now)?;
    let left =
        |deadline: &Value| Some(Duration::from_micros(number(deadline)?.saturating_sub(now_us)));
    let holder = |value: &Value| {
        let [id, mode, of, deadline, place, metadata] = array(value)? else { return None };
        let (owner, request) = parse_id(text(id)?)?;
        let of = token(number(of)?)?;
        let holder = Holder {
            owner,
            request,
            mode: read_mode(mode)?,
            token: of,
            held_for: Duration::from_micros(now_us.saturating_sub(of.get())),
            expires_in: left(deadline)?,
            metadata: optional_text(metadata)?,
        };
        Some(((number(place)?, of), holder))
    };
    let mut holders = array(holders)?.iter().map(holder).collect::<Option<Vec<_>>>()?;
    holders.sort_by_key(|(place, _)| *place);
    let waiter = |value: &Value| {
        let [id, mode, since, deadline, metadata] = array(value)? else { return None };
        let (owner, request) = parse_id(text(id)?)?;
        Some(Waiter {
            owner,
            request,
            mode: read_mode(mode)?,
            waiting_for: Duration::from_micros(now_us.saturating_sub(number(since)?)),
            expires_in: left(deadline)?,
            metadata: optional_text(metadata)?,
        })
    };
    Some(Inspection {
        holders: holders.into_iter().map(|(_, holder)| holder).collect(),
        waiters: array(waiters)?.iter().map(waiter).collect::<Option<_>>()?,
    })
}

/// What was pushed: the id, a space, and the tokens with how many were reserved, or `followed`.
pub(super) fn push(client: ClientId, payload: &Value) -> Option<Push> {
    let (id, told) = text(payload)?.split_once(' ')?;
    let (owner, request) = parse_id(id)?;
    if told == "followed" {
        return Some(Push::Followed(Followed { client, owner, request }));
    }
    let (tokens, block) = told.split_once(' ')?;
    let grant = Grant { request, tokens: runs(tokens)?, block: block.parse().ok()? };
    Some(Push::HandOver(HandOver { client, owner, grant }))
}

fn grant(tokens: &Value, part: &Part) -> Option<Grant> {
    let tokens = runs(text(tokens)?)?;
    let request: RequestId = part.request;
    (tokens.len() == part.wants.len()).then_some(Grant { request, tokens, block: 1 })
}

fn with_block(block: &Value, tokens: &Value, part: &Part) -> Option<Grant> {
    let block = u32::try_from(integer(block)?).ok()?;
    Some(Grant { block, ..grant(tokens, part)? })
}

/// Reads `token*times,...`.
fn runs(text: &str) -> Option<Vec<FencingToken>> {
    let mut tokens = Vec::new();
    for run in text.split(',') {
        let (number, times) = run.split_once('*')?;
        let times: usize = times.parse().ok().filter(|times| *times <= crate::types::MAX_KEYS)?;
        tokens.resize(tokens.len() + times, token(number.parse().ok()?)?);
    }
    Some(tokens)
}

fn token(number: u64) -> Option<FencingToken> {
    FencingToken::new(number)
}

fn array(value: &Value) -> Option<&[Value]> {
    match value {
        Value::Array(values) => Some(values),
        _ => None,
    }
}

fn tagged(value: &Value) -> Option<(&str, &[Value])> {
    let (tag, rest) = array(value)?.split_first()?;
    Some((text(tag)?, rest))
}

fn text(value: &Value) -> Option<&str> {
    match value {
        Value::BulkString(bytes) => std::str::from_utf8(bytes).ok(),
        Value::SimpleString(text) => Some(text),
        _ => None,
    }
}

fn optional_text(value: &Value) -> Option<Option<String>> {
    match value {
        Value::Nil | Value::Boolean(false) => Some(None),
        _ => Some(Some(text(value)?.to_owned())),
    }
}

fn integer(value: &Value) -> Option<u64> {
    match value {
        Value::Int(number) => u64::try_from(*number).ok(),
        _ => None,
    }
}

/// A number that a script wrote as text.
fn number(value: &Value) -> Option<u64> {
    text(value)?.parse().ok()
}

fn micros(value: &Value) -> Option<Duration> {
    integer(value).map(Duration::from_micros)
}

fn flag(value: &Value) -> Option<bool> {
    Some(integer(value)? != 0)
}

fn read_mode(value: &Value) -> Option<Mode> {
    match text(value)? {
        "x" => Some(Mode::Exclusive),
        "s" => Some(Mode::Shared),
        _ => None,
    }
}

/// Fails when the script found a value that is not ours.
fn refuse_corrupt(operation: &'static str, value: &Value) -> Result<()> {
    let Some(("corrupt", [redis_key])) = tagged(value) else { return Ok(()) };
    let name = text(redis_key).unwrap_or("with an unreadable name");
    let error = failure::corrupt(operation, name);
    match resource(name) {
        Some(key) => Err(error.with_key(key)),
        None => Err(error),
    }
}

fn unreadable(operation: &'static str, value: &Value) -> Error {
    let detail = "the answer of the Redis server is not one that palisade's scripts give; is a \
                  proxy or a module in between?";
    let shape = match value {
        Value::Array(values) => format!("an array of {}", values.len()),
        Value::Int(number) => format!("the number {number}"),
        Value::Nil => "nil".to_owned(),
        _ => "neither an array nor a number".to_owned(),
    };
    Error::new(ErrorKind::Unavailable, operation, detail).with_source(shape)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_tokens_are_read_strictly() {
        let numbers = |text: &str| -> Option<Vec<u64>> {
            runs(text).map(|tokens| tokens.iter().map(|token| token.get()).collect())
        };
        assert_eq!(numbers("7*2,9*1"), Some(vec![7, 7, 9]));
        for bad in ["", "7", "7*", "*2", "0*1", "7*2,", "9007199254740992*1", "7*100000"] {
            assert_eq!(numbers(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_answer_of_another_shape_is_no_verdict() {
        for value in [Value::Nil, Value::Int(2), Value::Array(vec![]), Value::Okay] {
            assert_eq!(released(&value).unwrap_err().kind(), ErrorKind::Unavailable, "{value:?}");
            assert!(inspection(&value).is_err());
        }
    }

    #[test]
    fn a_foreign_value_is_named_by_its_key_in_both_worlds() {
        let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let answer = Value::Array(vec![text("corrupt"), text("palisade:{0}:k:order:7")]);
        let error = released(&answer).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert_eq!(error.key().unwrap().as_str(), "order:7");
        assert!(error.to_string().contains("palisade:{0}:k:order:7"), "{error}");
    }
}
