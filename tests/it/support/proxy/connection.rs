//! One connection through the proxy.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::sleep;

use super::{Harm, Shared, Side, Strike};

/// The noise that follows a reply which has passed in full.
const NOISE: usize = 16;

/// Why a connection carries nothing any more.
enum End {
    Closed,
    Struck(Strike),
}

impl From<io::Error> for End {
    fn from(_: io::Error) -> Self {
        Self::Closed
    }
}

/// What a connection remembers from one message to the next.
struct Carrier {
    shared: Arc<Shared>,
    answered: bool,
    /// What befalls the next reply.
    due: Option<Strike>,
    /// The next message trickles.
    trickles: Option<(Duration, u64)>,
}

pub(super) async fn carry(mut client: TcpStream, mut server: TcpStream, shared: Arc<Shared>) {
    let mut carrier =
        Carrier { shared: Arc::clone(&shared), answered: true, due: None, trickles: None };
    let mut severed = shared.severed.subscribe();
    let end = tokio::select! {
        _ = severed.wait_for(|severed| *severed) => End::Closed,
        end = carrier.run(&mut client, &mut server) => end,
    };
    if let End::Struck(strike) = end {
        tokio::select! {
            () = self::end(client, server, strike.harm) => {}
            () = shared.calmed(strike.epoch) => {}
        }
    }
    shared.connections.fetch_sub(1, Ordering::SeqCst);
}

impl Carrier {
    async fn run(&mut self, client: &mut TcpStream, server: &mut TcpStream) -> End {
        let (mut request, mut reply) = (vec![0; 1 << 16], vec![0; 1 << 16]);
        let mut asks = true;
        loop {
            let passed = tokio::select! {
                read = client.read(&mut request), if asks => match read {
                    Ok(0) => {
                        asks = false;
                        server.shutdown().await.map_err(End::from)
                    }
                    Ok(n) => self.request(server, &request[..n]).await,
                    Err(error) => Err(error.into()),
                },
                read = server.read(&mut reply) => match read {
                    Ok(0) => Err(End::Closed),
                    Ok(n) => self.reply(client, &reply[..n]).await,
                    Err(error) => Err(error.into()),
                },
            };
            if let Err(end) = passed {
                return end;
            }
        }
    }

    async fn request(&mut self, server: &mut TcpStream, bytes: &[u8]) -> Result<(), End> {
        if std::mem::replace(&mut self.answered, false) {
            self.shared.requests.fetch_add(1, Ordering::SeqCst);
        }
        match self.shared.strike(bytes) {
            Some(strike) if strike.at.is_before_the_server() => {
                self.pass(server, bytes, Some(strike)).await
            }
            strike => {
                self.due = strike.or(self.due.take());
                self.pass(server, bytes, None).await
            }
        }
    }

    async fn reply(&mut self, client: &mut TcpStream, bytes: &[u8]) -> Result<(), End> {
        self.answered = true;
        let strike = self.due.take();
        self.pass(client, bytes, strike).await
    }

    /// Carries one message, up to the strike and as far beyond it as it lets through.
    async fn pass(
        &mut self,
        to: &mut TcpStream,
        bytes: &[u8],
        strike: Option<Strike>,
    ) -> Result<(), End> {
        let Some(strike) = strike else {
            let passed = match self.trickles.take() {
                Some((pause, epoch)) => self.trickle(to, bytes, pause, epoch).await,
                None => to.write_all(bytes).await,
            };
            return passed.map_err(End::from);
        };
        let (before, rest) = bytes.split_at(strike.at.passed(bytes.len()));
        to.write_all(before).await?;
        self.shared.count(strike);
        match strike.harm {
            Harm::Delay(pause) => {
                self.pause(pause, strike.epoch).await;
                to.write_all(rest).await?;
            }
            Harm::Trickle(pause) if rest.is_empty() => self.trickles = Some((pause, strike.epoch)),
            Harm::Trickle(pause) => self.trickle(to, rest, pause, strike.epoch).await?,
            Harm::Garbage(seed) => {
                let mut random = fastrand::Rng::with_seed(seed);
                let length = if rest.is_empty() { NOISE } else { rest.len() };
                let noise: Vec<u8> = (0..length).map(|_| random.u8(..)).collect();
                to.write_all(&noise).await?;
            }
            Harm::Drop | Harm::Cut | Harm::Reset | Harm::HalfOpen(_) => {
                return Err(End::Struck(strike));
            }
        }
        Ok(())
    }

    async fn trickle(
        &self,
        to: &mut TcpStream,
        bytes: &[u8],
        pause: Duration,
        epoch: u64,
    ) -> io::Result<()> {
        for byte in bytes {
            to.write_all(&[*byte]).await?;
            self.pause(pause, epoch).await;
        }
        Ok(())
    }

    /// Waits, but not beyond the moment when the network is calmed.
    async fn pause(&self, pause: Duration, epoch: u64) {
        tokio::select! {
            () = sleep(pause) => {}
            () = self.shared.calmed(epoch) => {}
        }
    }
}

/// Ends a connection, and keeps open what is to stay open.
async fn end(client: TcpStream, server: TcpStream, harm: Harm) {
    match harm {
        Harm::HalfOpen(Side::Client) => {
            drop(client);
            swallow(server).await;
        }
        Harm::HalfOpen(Side::Server) => {
            drop(server);
            swallow(client).await;
        }
        Harm::Drop => {
            tokio::join!(swallow(client), swallow(server));
        }
        Harm::Reset => {
            // A socket that is already broken needs no reset.
            let _ = client.set_zero_linger();
            let _ = server.set_zero_linger();
        }
        Harm::Cut | Harm::Delay(_) | Harm::Trickle(_) | Harm::Garbage(_) => {}
    }
}

/// Reads until the other end closes, for nobody.
async fn swallow(mut from: TcpStream) {
    let mut buffer = vec![0; 1 << 12];
    while matches!(from.read(&mut buffer).await, Ok(1..)) {}
}
