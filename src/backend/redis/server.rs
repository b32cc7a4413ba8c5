//! Where the server is, and how a connection to it is opened.

use std::convert::Infallible;
use std::sync::Arc;

use redis::aio::MultiplexedConnection;
use redis::{
    AsyncConnectionConfig, ConnectionAddr, ConnectionInfo, IntoConnectionInfo as _,
    ProtocolVersion, PushInfo, PushKind, RedisError,
};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::failure;
use super::options::{TlsOptions, invalid};
use super::subscribers::Subscribers;
use super::tls::Tls;
use crate::error::Result;

/// A server, known by its URL.
pub(super) struct Server {
    client: redis::Client,
    tls: Option<Tls>,
}

/// An open connection, and what carries it.
pub(super) struct Wire {
    pub(super) connection: MultiplexedConnection,
    /// redis-rs looks after its own connections; one by TLS ends with this.
    _carrier: Option<AbortOnDropHandle<()>>,
}

impl Server {
    /// Reads the URL, which is not shown in an error: it may hold a password.
    pub(super) fn parse(url: &str, tls: Option<&TlsOptions>) -> Result<Self> {
        let (scheme, rest) = url.split_once(':').unwrap_or((url, ""));
        let secure = matches!(scheme, "rediss" | "valkeys");
        if tls.is_some() && !secure {
            return Err(invalid(
                "RedisOptions::tls is set, and the URL does not begin with rediss:",
            ));
        }
        if secure && rest.ends_with("#insecure") {
            return Err(invalid("certificates are always checked; set TlsOptions::roots instead"));
        }
        let info = if secure { parse(&format!("redis:{rest}"))? } else { parse(url)? };
        let tls = match info.addr() {
            ConnectionAddr::Tcp(host, port) if secure => {
                Some(Tls::new(host, *port, tls.unwrap_or(&TlsOptions::default()))?)
            }
            _ => None,
        };
        let client = redis::Client::open(info);
        Ok(Self { client: client.map_err(|error| failure::explain("connect", error))?, tls })
    }

    /// Opens a connection whose pushes go to `subscribers`. `retired` is cancelled when it is lost.
    pub(super) async fn open(
        &self,
        subscribers: Option<&Arc<Subscribers>>,
        retired: CancellationToken,
    ) -> Result<Wire, RedisError> {
        let subscribers = subscribers.cloned();
        let on_push = move |push: PushInfo| -> Result<(), Infallible> {
            if push.kind == PushKind::Disconnection {
                retired.cancel();
            } else if let Some(subscribers) = &subscribers {
                subscribers.deliver(&push);
            }
            Ok(())
        };
        // Callers bound their calls themselves: a time-out here would only hide whose it was.
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(None)
            .set_response_timeout(None)
            .set_push_sender(on_push);
        let Some(tls) = &self.tls else {
            let connection = self.client.get_multiplexed_async_connection_with_config(&config);
            return Ok(Wire { connection: connection.await?, _carrier: None });
        };
        let settings = self.client.get_connection_info().redis_settings();
        let stream = tls.connect().await?;
        let (connection, carrier) =
            MultiplexedConnection::new_with_config(settings, stream, config).await?;
        let carrier = AbortOnDropHandle::new(tokio::spawn(carrier));
        Ok(Wire { connection, _carrier: Some(carrier) })
    }
}

fn parse(url: &str) -> Result<ConnectionInfo> {
    let info = url.into_connection_info().map_err(|_| {
        invalid(
            "the URL is not of the form redis://[user:password@]host[:port][/database], \
             rediss://… or redis+unix:///path?db=0; it is not repeated here, since it may hold a \
             password",
        )
    })?;
    let settings = info.redis_settings().clone().set_protocol(ProtocolVersion::RESP3);
    let tcp = info.tcp_settings().clone().set_nodelay(true);
    Ok(info.set_redis_settings(settings).set_tcp_settings(tcp))
}
