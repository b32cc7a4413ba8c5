//! Redis behind TLS: whom the client trusts, and whom the server does.

use std::time::Duration;

use palisade::Mode::Exclusive as X;
use palisade::backend::{ClientCertificate, LockBackend, RedisBackend, RedisOptions, TlsOptions};
use palisade::protocol::{Acquired, Released};
use palisade::{Error, ErrorKind};

use crate::redis_asks::{Client, SOON, tokens};
use crate::support::{Certificates, NEXT_PORT, RedisServer, wait_until};

/// A server that shows the certificate `name`, and wants one of its clients if told so.
fn serve(certificates: &Certificates, name: &str, of_clients: &str) -> RedisServer {
    let [pem, key, root] = [&format!("{name}.pem"), &format!("{name}.key"), "root.pem"]
        .map(|file| certificates.path(file).to_str().unwrap().to_owned());
    let files = ["--tls-cert-file", &pem, "--tls-key-file", &key, "--tls-ca-cert-file", &root];
    let args = ["--tls-port", NEXT_PORT, "--tls-auth-clients", of_clients];
    RedisServer::start_with(&[&args[..], &files].concat())
}

fn url(server: &RedisServer) -> String {
    format!("rediss://127.0.0.1:{}", server.next_port())
}

fn trusting(certificates: &Certificates, client: Option<&str>) -> TlsOptions {
    TlsOptions {
        roots: Some(certificates.read("root.pem")),
        client: client.map(|name| ClientCertificate {
            chain: certificates.read(&format!("{name}.pem")),
            key: certificates.read(&format!("{name}.key")),
        }),
    }
}

async fn connect(url: &str, tls: TlsOptions) -> Result<RedisBackend, Error> {
    let options = RedisOptions { tls: Some(tls), reconnect_for: SOON, ..RedisOptions::default() };
    RedisBackend::connect(url, options).await
}

fn assert_denied(error: &Error, says: &str) {
    println!("{error}: {:?}", std::error::Error::source(error).map(ToString::to_string));
    assert_eq!(error.kind(), ErrorKind::Denied, "{error:?}");
    assert!(error.to_string().contains(says), "{error}");
}

#[tokio::test]
async fn locks_are_taken_handed_over_and_found_again_by_tls() {
    let certificates = Certificates::new();
    certificates.sign("server");
    certificates.sign("client");
    let server = serve(&certificates, "server", "yes");
    let redis = connect(&url(&server), trusting(&certificates, Some("client"))).await.unwrap();
    let client = Client::of(&redis).await;
    for _ in 0..2 {
        let (first, second) = (client.ask(&[("k", X)]), client.ask(&[("k", X)]));
        tokens(&redis.acquire(&first).await.unwrap());
        assert!(matches!(redis.acquire(&second).await.unwrap(), Acquired::Queued { .. }));
        assert_eq!(redis.release(&first.part).await.unwrap(), Released::Released);
        wait_until("the grant is pushed", SOON, async || client.was_told(&second)).await;
        assert_eq!(redis.release(&second.part).await.unwrap(), Released::Released);
        server.restart_empty();
        let channel = format!("palisade:c:{}", client.id);
        wait_until("the channel is subscribed to again", SOON, async || {
            server.command(&["PUBSUB", "NUMSUB", &channel]).ends_with("\n1")
        })
        .await;
    }
    let clients = || server.command(&["CLIENT", "LIST"]).lines().count();
    let tasks = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    assert!(tasks > 0 && clients() > 1);
    drop(redis);
    wait_until("its tasks and connections have ended", SOON, async || {
        tokio::runtime::Handle::current().metrics().num_alive_tasks() == 0 && clients() == 1
    })
    .await;
}

#[tokio::test]
async fn a_server_whose_certificate_is_not_to_be_trusted_is_denied_at_once() {
    let certificates = Certificates::new();
    let others = Certificates::new();
    let names = [
        certificates.sign("server"),
        certificates.sign_expired("expired"),
        certificates.sign_for_other_host("other"),
    ];
    for (name, roots) in names.iter().zip([&others, &certificates, &certificates]) {
        let server = serve(&certificates, name, "no");
        let error = connect(&url(&server), trusting(roots, None)).await.unwrap_err();
        assert_denied(&error, "TlsOptions::roots");
    }
}

#[tokio::test]
async fn a_client_without_a_certificate_or_with_one_that_has_ended_is_denied() {
    let certificates = Certificates::new();
    let others = Certificates::new();
    certificates.sign("server");
    certificates.sign_expired("expired");
    others.sign("stranger");
    let server = serve(&certificates, "server", "yes");
    let mut options = [
        trusting(&certificates, None),
        trusting(&certificates, Some("expired")),
        trusting(&others, Some("stranger")),
    ];
    options[2].roots = options[0].roots.clone();
    for options in options {
        let error = connect(&url(&server), options).await.unwrap_err();
        assert_denied(&error, "TlsOptions::client");
    }
}

#[tokio::test]
async fn without_options_the_roots_of_the_system_decide() {
    let certificates = Certificates::new();
    certificates.sign("server");
    let server = serve(&certificates, "server", "no");
    let error = RedisBackend::connect(&url(&server), RedisOptions::default()).await.unwrap_err();
    // A machine may have none at all.
    assert!(matches!(error.kind(), ErrorKind::Denied | ErrorKind::InvalidInput), "{error:?}");
    assert!(error.to_string().contains("TlsOptions::roots"), "{error}");
    let error = palisade::connect(&url(&server)).await.unwrap_err();
    assert!(error.to_string().contains("TlsOptions::roots"), "{error}");
}

#[tokio::test]
async fn who_speaks_tls_to_a_server_that_does_not_or_the_other_way_round_is_told() {
    let certificates = Certificates::new();
    certificates.sign("server");
    let server = serve(&certificates, "server", "no");
    let options = RedisOptions {
        reconnect_for: Duration::from_millis(300),
        tls: Some(trusting(&certificates, None)),
        ..RedisOptions::default()
    };
    let plain = format!("rediss://127.0.0.1:{}", server.port());
    let error = RedisBackend::connect(&plain, options.clone()).await.unwrap_err();
    assert!(error.is_unavailable(), "{error:?}");
    let options = RedisOptions { tls: None, ..options };
    let secure = format!("redis://127.0.0.1:{}", server.next_port());
    let error = RedisBackend::connect(&secure, options).await.unwrap_err();
    assert!(error.is_unavailable(), "{error:?}");
}

#[tokio::test]
async fn options_that_cannot_work_are_refused_before_any_connection_and_never_shown() {
    let certificates = Certificates::new();
    certificates.sign("client");
    certificates.sign("other");
    let good = || trusting(&certificates, Some("client"));
    let with = |edit: fn(&mut ClientCertificate)| {
        let mut options = good();
        edit(options.client.as_mut().unwrap());
        options
    };
    let mut swapped = good();
    swapped.client.as_mut().unwrap().key = certificates.read("other.key");
    let nowhere = "rediss://127.0.0.1:1";
    for (url, options) in [
        ("redis://127.0.0.1:1", good()),
        ("rediss://127.0.0.1:1/#insecure", good()),
        (nowhere, TlsOptions { roots: Some(b"not a certificate".to_vec()), ..good() }),
        (nowhere, TlsOptions { roots: Some(Vec::new()), ..good() }),
        (nowhere, with(|client| client.key = b"-----BEGIN PRIVATE KEY-----\nc2VjcmV0".to_vec())),
        (nowhere, with(|client| client.key.clear())),
        (nowhere, with(|client| client.chain.clear())),
        (nowhere, swapped),
    ] {
        let shown = format!("{options:?}");
        assert!(!shown.contains("c2VjcmV0") && shown.len() < 100, "{shown}");
        let error = connect(url, options).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error:?}");
        assert!(!format!("{error:?}").contains("c2VjcmV0"), "{error:?}");
    }
}
