//! Connections by TLS.
//!
//! # Why not through redis-rs
//! It takes whatever cryptography the process has chosen, and panics where it has not; it reads the
//! roots of the system anew for every connection; and it offers not to check certificates.

use std::error::Error as StdError;
use std::io;
use std::sync::Arc;

use redis::RedisError;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{AlertDescription, ClientConfig, Error as TlsError, RootCertStore};

use super::options::{ClientCertificate, TlsOptions, invalid};
use crate::error::Result;

/// How to reach one server by TLS.
pub(super) struct Tls {
    connector: TlsConnector,
    host: String,
    port: u16,
    name: ServerName<'static>,
}

impl Tls {
    /// Reads roots, certificate and key.
    pub(super) fn new(host: &str, port: u16, options: &TlsOptions) -> Result<Self> {
        let name = ServerName::try_from(host.to_owned());
        let name = name.map_err(|_| invalid("the host of the URL cannot be in a certificate"))?;
        // What the process has chosen, if it has: it may have to be a certified one.
        let provider = CryptoProvider::get_default()
            .map_or_else(|| Arc::new(ring::default_provider()), Arc::clone);
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| invalid("this process has no TLS 1.2 or 1.3").with_source(error))?
            .with_root_certificates(roots(options)?);
        let config = match &options.client {
            None => config.with_no_client_auth(),
            Some(client) => {
                let (chain, key) = identity(client)?;
                config.with_client_auth_cert(chain, key).map_err(|error| {
                    invalid("TlsOptions::client: certificate and key do not belong together")
                        .with_source(error)
                })?
            }
        };
        Ok(Self { connector: Arc::new(config).into(), host: host.to_owned(), port, name })
    }

    pub(super) async fn connect(&self) -> io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await?;
        stream.set_nodelay(true)?;
        self.connector.connect(self.name.clone(), stream).await
    }
}

fn roots(options: &TlsOptions) -> Result<RootCertStore> {
    let mut store = RootCertStore::empty();
    match &options.roots {
        Some(pem) => {
            for root in CertificateDer::pem_slice_iter(pem) {
                let added = root
                    .map_err(|error| error.to_string())
                    .and_then(|root| store.add(root).map_err(|error| error.to_string()));
                added.map_err(|error| {
                    invalid("TlsOptions::roots holds what is no root certificate")
                        .with_source(error)
                })?;
            }
        }
        None => {
            store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        }
    }
    if store.is_empty() {
        return Err(invalid("there is no root certificate to trust; set TlsOptions::roots"));
    }
    Ok(store)
}

fn identity(
    client: &ClientCertificate,
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let chain = CertificateDer::pem_slice_iter(&client.chain).collect::<Result<Vec<_>, _>>();
    let chain = chain.map_err(|_| invalid("the chain of TlsOptions::client is no PEM"))?;
    if chain.is_empty() {
        return Err(invalid("the chain of TlsOptions::client holds no certificate"));
    }
    // What is wrong with a key is not repeated: the text might show a part of it.
    let key = PrivateKeyDer::from_pem_slice(&client.key)
        .map_err(|_| invalid("the key of TlsOptions::client is no private key in PEM"))?;
    Ok((chain, key))
}

/// Why one side does not want to talk to the other, if that is what is wrong.
pub(super) fn refusal(error: &RedisError) -> Option<&'static str> {
    use AlertDescription as Alert;
    match tls_error(error)? {
        TlsError::InvalidCertificate(_) => Some(
            "the certificate of the Redis server was refused; see TlsOptions::roots, the host in \
             the URL, and when the certificate ends",
        ),
        TlsError::AlertReceived(
            Alert::CertificateRequired
            | Alert::BadCertificate
            | Alert::UnsupportedCertificate
            | Alert::CertificateRevoked
            | Alert::CertificateExpired
            | Alert::CertificateUnknown
            | Alert::UnknownCA
            | Alert::AccessDenied
            | Alert::HandshakeFailure,
        ) => Some(
            "the Redis server wants a certificate of its clients, or refused this one; see \
             TlsOptions::client, and when the certificate ends",
        ),
        _ => None,
    }
}

/// What rustls has said. redis-rs keeps the error of the socket behind a pointer of its own, and
/// that one keeps what caused it where `source` does not lead.
fn tls_error(error: &RedisError) -> Option<&TlsError> {
    let shared = error.source()?.downcast_ref::<Arc<dyn StdError + Send + Sync>>()?;
    shared.downcast_ref::<io::Error>()?.get_ref()?.downcast_ref()
}
