//! What is said on a new connection before anything else.

use redis::aio::MultiplexedConnection;
use redis::{Cmd, RedisError, Value};

use super::condition;
use super::failure::corrupt;
use super::options::RedisOptions;
use super::request::PARTITIONS;
use super::script::Script;
use crate::error::{Error, ErrorKind};

const OPERATION: &str = "connect";

/// Why there is no connection.
pub(super) enum Refusal {
    /// The server said so, or was not there.
    Redis(RedisError),
    /// The server is there, and is not to be used.
    Final(Error),
}

impl Refusal {
    /// A copy that says the same.
    pub(super) fn to_keep(&self) -> Self {
        match self {
            Self::Redis(error) => Self::Redis(error.clone()),
            Self::Final(error) => Self::Final(error.to_keep()),
        }
    }
}

impl From<RedisError> for Refusal {
    fn from(error: RedisError) -> Self {
        Self::Redis(error)
    }
}

/// How the server knows a connection.
pub(super) struct Peer {
    id: String,
    address: String,
}

/// Sends one command. An error of the server is an error, which redis-rs leaves to its callers.
pub(super) async fn ask(
    connection: &mut MultiplexedConnection,
    command: &Cmd,
) -> Result<Value, RedisError> {
    connection.send_packed_command(command).await?.extract_error()
}

/// Ends the connection before this one, checks the number of partitions, and loads the scripts.
pub(super) async fn greet(
    connection: &mut MultiplexedConnection,
    options: &RedisOptions,
    previous: Option<&Peer>,
) -> Result<Option<Peer>, Refusal> {
    if let Some(previous) = previous {
        end(connection, previous).await?;
    }
    let peer = introduce(connection).await?;
    condition::check(connection, options).await?;
    check_partitions(connection, options.partitions).await?;
    for load in Script::load_all() {
        // A user that may not load scripts may still run them: then they are sent when needed.
        tolerate(ask(connection, &load).await)?;
    }
    Ok(peer)
}

/// Closes the connection that this one replaces, with whatever it still has in its buffers: a
/// command sent there must not be run after one that is sent here.
///
/// Its address is part of the order, since ids begin anew when a server is restarted.
async fn end(connection: &mut MultiplexedConnection, previous: &Peer) -> Result<(), RedisError> {
    let mut kill = redis::cmd("CLIENT");
    kill.arg("KILL").arg("ID").arg(&previous.id).arg("ADDR").arg(&previous.address);
    tolerate(ask(connection, &kill).await)
}

async fn introduce(connection: &mut MultiplexedConnection) -> Result<Option<Peer>, RedisError> {
    let mut info = redis::cmd("CLIENT");
    info.arg("INFO");
    let text = match ask(connection, &info).await {
        Ok(value) => text(value).unwrap_or_default(),
        Err(error) => return tolerate(Err(error)).map(|()| None),
    };
    let field = |name: &str| {
        text.split_whitespace().find_map(|word| word.strip_prefix(name)).map(str::to_owned)
    };
    // All clients of a unix socket have one address, with port 0: there, nobody can be told apart.
    let address = field("addr=").filter(|address| !address.ends_with(":0"));
    Ok(address.and_then(|address| Some(Peer { id: field("id=")?, address })))
}

/// The text that the server shows to people.
pub(super) fn text(value: Value) -> Option<String> {
    match value {
        Value::BulkString(text) => Some(String::from_utf8_lossy(&text).into_owned()),
        Value::VerbatimString { text, .. } => Some(text),
        _ => None,
    }
}

/// Stores the number of partitions where there is none, and compares it where there is one.
async fn check_partitions(
    connection: &mut MultiplexedConnection,
    partitions: u16,
) -> Result<(), Refusal> {
    let mut get = redis::cmd("GET");
    let stored = match ask(connection, get.arg(PARTITIONS)).await {
        Err(error) if error.code() == Some("WRONGTYPE") => {
            return Err(Refusal::Final(corrupt(OPERATION, PARTITIONS).with_source(error)));
        }
        Err(error) => return Err(error.into()),
        Ok(Value::Nil) => {
            let mut set = redis::cmd("SET");
            set.arg(PARTITIONS).arg(partitions).arg("NX").arg("GET");
            match ask(connection, &set).await {
                Ok(stored) => stored,
                // What is held must still be released and renewed; the next connection stores it.
                Err(error) if matches!(error.code(), Some("OOM" | "NOREPLICAS")) => Value::Nil,
                Err(error) => return Err(error.into()),
            }
        }
        Ok(stored) => stored,
    };
    let found = match &stored {
        Value::Nil => return Ok(()),
        Value::BulkString(text) => String::from_utf8_lossy(text).parse::<u16>().ok(),
        _ => None,
    };
    match found {
        Some(found) if found == partitions => Ok(()),
        Some(found) if found > 0 => {
            let detail = format!(
                "this Redis is set up for {found} partitions, and the options ask for \
                 {partitions}; set RedisOptions::partitions to {found}"
            );
            Err(Refusal::Final(Error::new(ErrorKind::InvalidInput, OPERATION, detail)))
        }
        _ => Err(Refusal::Final(corrupt(OPERATION, PARTITIONS))),
    }
}

/// Lets an error of the server pass, but not one of the connection.
fn tolerate(answer: Result<Value, RedisError>) -> Result<(), RedisError> {
    match answer {
        Err(error) if error.is_io_error() => Err(error),
        _ => Ok(()),
    }
}
