//! A process that asks for a key. It pauses whenever nobody calls it: nothing is sent for it.

use std::sync::Arc;
use std::time::Duration;

use palisade::backend::LockBackend;
use palisade::protocol::{Acquire, Acquired, Part, Released, Renewal, Renewed, Standing};
use palisade::{
    ClientId, FencingToken, Lease, Mode, OwnerId, Partition, RequestId, ResourceKey, Want,
};
use tokio::time::{Instant, sleep, timeout};

use super::Verdict;
use super::service::Service;

/// The lease of a process that is about to pause: others wait it out.
pub const SHORT: Duration = Duration::from_millis(300);
/// Longer than any run.
pub const LONG: Duration = Duration::from_secs(600);

const SOON: Duration = Duration::from_secs(20);

pub struct Holder {
    locks: Arc<dyn LockBackend>,
    ask: Acquire,
    token: Option<FencingToken>,
    /// When the service said that the key is held, and until when that is so.
    told: Vec<(Instant, Instant)>,
}

impl Holder {
    /// A new owner, which wants `key` for `lease`.
    pub fn new(service: &Service, key: &str, lease: Duration) -> Self {
        let client = ClientId::random();
        let want = Want::new(ResourceKey::parse(key).unwrap(), Mode::Exclusive);
        let part = Part {
            partition: Partition(0),
            owner: OwnerId::new(client),
            request: RequestId::next(),
            wants: [want].into(),
        };
        let ask = Acquire {
            part,
            client,
            lease: Lease::new(lease).unwrap(),
            standing: Standing::Fresh,
            wait: false,
            floor: None,
            limit: 100,
            block: 1,
            metadata: None,
        };
        Self { locks: service.locks(), ask, token: None, told: Vec::new() }
    }

    /// Its tokens are above this one.
    pub fn above(mut self, floor: FencingToken) -> Self {
        self.ask.floor = Some(floor);
        self
    }

    pub fn key(&self) -> &ResourceKey {
        &self.ask.part.wants[0].key
    }

    pub fn owner(&self) -> OwnerId {
        self.ask.part.owner
    }

    /// The token of its grant.
    pub fn token(&self) -> FencingToken {
        self.token.expect("the key was granted")
    }

    /// Asks once. Whether the key was granted.
    pub async fn try_acquire(&mut self) -> palisade::Result<bool> {
        self.ask.part.request = RequestId::next();
        let sent = Instant::now();
        let Acquired::Granted(grant) = self.locks.acquire(&self.ask).await? else {
            return Ok(false);
        };
        self.token = Some(grant.tokens[0]);
        self.hear(sent);
        Ok(true)
    }

    /// Asks until the key is granted.
    ///
    /// # Panics
    /// When it is not granted soon.
    pub async fn acquire(&mut self) {
        assert!(self.is_granted_within(SOON).await, "{} is not granted", self.key());
    }

    /// Asks again and again, whatever the answer.
    pub async fn is_granted_within(&mut self, patience: Duration) -> bool {
        let granted = async {
            while !self.try_acquire().await.unwrap_or(false) {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(patience, granted).await.is_ok()
    }

    /// Whether the service says that the key is still held, now for `lease`.
    pub async fn renew(&mut self, lease: Duration) -> bool {
        let part = self.ask.part.clone();
        self.ask.lease = Lease::new(lease).unwrap();
        let renewal = Renewal { part, lease: self.ask.lease, waiting: false };
        let sent = Instant::now();
        let renewed = self.locks.renew(Partition(0), &[renewal]).await.unwrap();
        let held = matches!(renewed[0], Renewed::Held(_));
        if held {
            self.hear(sent);
        }
        held
    }

    pub async fn release(&mut self) -> Released {
        let sent = Instant::now();
        for (_, until) in &mut self.told {
            *until = sent.min(*until);
        }
        self.locks.release(&self.ask.part).await.unwrap()
    }

    /// How many entries its key has at the service, of any owner.
    pub async fn entries(&self) -> usize {
        self.locks.inspect(Partition(0), self.key()).await.unwrap().holders.len()
    }

    fn hear(&mut self, sent: Instant) {
        let lease = self.ask.lease;
        self.told.push((Instant::now(), sent + lease.get() - lease.drift()));
    }
}

/// The service never told two of them that they hold the key at one time.
pub fn exclusive(holders: &[&Holder]) -> Verdict {
    let of = |(who, holder): (usize, &&Holder)| {
        holder.told.clone().into_iter().map(move |(from, until)| (who, from, until))
    };
    let told: Vec<_> = holders.iter().enumerate().flat_map(of).collect();
    for (one, from, until) in &told {
        for (other, since, end) in &told {
            let both = until.min(end).saturating_duration_since(*from.max(since));
            if one < other && !both.is_zero() {
                return Err(format!("two holders of one key for {both:.1?}"));
            }
        }
    }
    Ok(format!("{} grants and renewals, never two holders", told.len()))
}
