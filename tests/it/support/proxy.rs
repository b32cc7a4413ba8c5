//! A proxy between a client and its server that loses what it is told to lose.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;

/// What happens to a request. Each time the client sees a closed connection, and the server keeps
/// its own side open, as if the network between them had broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The server gets the request; its reply is lost.
    LoseReply,
    /// The server never sees the request.
    LoseRequest,
}

/// A proxy on a loopback port of its own, for one server.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
    accepting: tokio::task::JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Shared {
    plan: Mutex<Option<(Vec<u8>, Fault)>>,
    requests: AtomicUsize,
    refuses: Mutex<bool>,
    done: Notify,
    /// Sides of the server whose client was cut off.
    stranded: Mutex<Vec<OwnedWriteHalf>>,
}

impl Proxy {
    /// A proxy for the server at `port` on 127.0.0.1.
    pub async fn start(port: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let own = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared::default());
        let accepting = tokio::spawn({
            let shared = Arc::clone(&shared);
            async move {
                while let Ok((client, _)) = listener.accept().await {
                    if *shared.refuses.lock().unwrap() {
                        continue;
                    }
                    if let Ok(server) = TcpStream::connect(("127.0.0.1", port)).await {
                        client.set_nodelay(true).unwrap();
                        server.set_nodelay(true).unwrap();
                        tokio::spawn(carry(client, server, Arc::clone(&shared)));
                    }
                }
            }
        });
        Self { port: own, shared, accepting }
    }

    /// Where clients connect to on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The next request that contains `text` meets `fault`. Only that one.
    pub fn plan(&self, text: &str, fault: Fault) {
        *self.shared.plan.lock().unwrap() = Some((text.as_bytes().to_vec(), fault));
    }

    /// Resolves when the planned fault has happened.
    pub async fn happened(&self) {
        self.shared.done.notified().await;
    }

    /// Whether new connections are closed at once.
    pub fn refuse(&self, refuse: bool) {
        *self.shared.refuses.lock().unwrap() = refuse;
    }

    /// How often a client has sent something after it had an answer: round trips, from all of them.
    pub fn round_trips(&self) -> usize {
        self.shared.requests.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// One connection: two directions, and what they know of each other.
#[derive(Debug, Default)]
struct Link {
    answered: Mutex<bool>,
    cut: Mutex<bool>,
    swallowed: Notify,
}

async fn carry(client: TcpStream, server: TcpStream, shared: Arc<Shared>) {
    let (client_in, client_out) = client.into_split();
    let (server_in, server_out) = server.into_split();
    let link = Arc::new(Link { answered: Mutex::new(true), ..Link::default() });
    let back = tokio::spawn(replies(server_in, client_out, Arc::clone(&link)));
    let (server_out, stranded) = requests(client_in, server_out, &shared, &link).await;
    if stranded {
        // The server's side stays open; the client's is closed with the task that would answer it.
        shared.stranded.lock().unwrap().push(server_out);
        back.abort();
        let _ = back.await;
        shared.done.notify_one();
    }
}

/// Carries requests. Returns the way to the server, and whether the client was cut off.
async fn requests(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    shared: &Shared,
    link: &Link,
) -> (OwnedWriteHalf, bool) {
    let mut buffer = vec![0; 1 << 16];
    while let Ok(n) = from.read(&mut buffer).await {
        if n == 0 {
            let _ = to.shutdown().await;
            break;
        }
        if std::mem::replace(&mut *link.answered.lock().unwrap(), false) {
            shared.requests.fetch_add(1, Ordering::SeqCst);
        }
        let fault = planned(shared, &buffer[..n]);
        *link.cut.lock().unwrap() = fault.is_some();
        if fault != Some(Fault::LoseRequest) && to.write_all(&buffer[..n]).await.is_err() {
            break;
        }
        if fault.is_some() {
            if fault == Some(Fault::LoseReply) {
                link.swallowed.notified().await;
            }
            return (to, true);
        }
    }
    (to, false)
}

async fn replies(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    link: Arc<Link>,
) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        let n = from.read(&mut buffer).await?;
        if n == 0 {
            return to.shutdown().await;
        }
        if *link.cut.lock().unwrap() {
            link.swallowed.notify_one();
            continue;
        }
        *link.answered.lock().unwrap() = true;
        to.write_all(&buffer[..n]).await?;
    }
}

fn planned(shared: &Shared, request: &[u8]) -> Option<Fault> {
    let mut plan = shared.plan.lock().unwrap();
    let (text, fault) = plan.as_ref()?;
    let fault = *fault;
    let found = request.windows(text.len()).any(|window| window == text.as_slice());
    found.then(|| {
        *plan = None;
        fault
    })
}
