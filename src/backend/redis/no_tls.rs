//! In place of `tls.rs`, where the feature `redis-tls` is off.

use std::convert::Infallible;
use std::io;

use redis::RedisError;
use tokio::net::TcpStream;

use super::options::{TlsOptions, invalid};
use crate::error::Result;

/// There is none.
pub(super) struct Tls(Infallible);

impl Tls {
    pub(super) fn new(_: &str, _: u16, _: &TlsOptions) -> Result<Self> {
        Err(invalid("rediss: needs the feature redis-tls of palisade"))
    }

    pub(super) async fn connect(&self) -> io::Result<TcpStream> {
        match self.0 {}
    }
}

pub(super) fn refusal(_: &RedisError) -> Option<&'static str> {
    None
}
