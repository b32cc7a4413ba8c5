//! The client's books: what each owner holds here, and whether a request of it is under way.
//!
//! The grant rule needs to know what an owner holds *elsewhere* before it may wait, and only the
//! client that made the owner can know that.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::protocol::{Admission, admit};
use crate::types::{
    ClientId, FencingToken, IdMap, LeaseState, OwnerId, Partition, RequestId, ResourceKey, Want,
};

use super::lane::Lane;

/// How many owners that were fenced out are remembered after their last lock has gone.
const REMEMBERED: usize = 1024;

#[derive(Debug, Default)]
pub(super) struct Owners {
    books: Mutex<Books>,
}

#[derive(Debug, Default)]
struct Books {
    open: IdMap<OwnerId, Book>,
    fenced_out: VecDeque<OwnerId>,
}

#[derive(Debug, Default)]
struct Book {
    entries: Vec<Entry>,
    /// A request for new keys is under way: sent, queued, or backing off.
    asking: bool,
}

/// One grant of an owner.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) partition: Partition,
    pub(super) request: RequestId,
    pub(super) wants: Arc<[Want]>,
    pub(super) state: Arc<LeaseState>,
    /// Under which name the service knows the owner in this partition, if not its own.
    pub(super) alias: Option<Alias>,
    /// To whom the grant may be passed on.
    pub(super) lane: Option<Arc<Lane>>,
}

/// The name of an owner at the service, where a lane asked for it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Alias {
    /// The owner that the service knows.
    pub(super) owner: OwnerId,
    /// What the service takes for its token,
    pub(super) token: FencingToken,
    /// and what it is.
    pub(super) instead: FencingToken,
}

impl Alias {
    /// The tokens of an answer of the service, as they are.
    pub(super) fn correct(self, tokens: Vec<FencingToken>) -> Vec<FencingToken> {
        let correct = |token| if token == self.token { self.instead } else { token };
        tokens.into_iter().map(correct).collect()
    }
}

/// What the books say about a request.
pub(super) enum Entrance {
    /// What to do, and under which name; while the ticket lives, no other request of the owner may
    /// ask for new keys.
    Open(Admission, Option<Ticket>, Option<Alias>),
    /// A store has rejected this owner. It gets no new grant.
    FencedOut,
}

/// Marks an owner as asking until it is dropped.
pub(super) struct Ticket {
    owners: Arc<Owners>,
    owner: OwnerId,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut books = self.owners.lock();
        if let Some(book) = books.open.get_mut(&self.owner) {
            book.asking = false;
        }
        books.forget_if_empty(self.owner);
    }
}

impl Owners {
    /// Decides about the `wants` of `owner` in one partition, and marks it as asking if it may go
    /// on to ask for new keys.
    pub(super) fn enter(
        self: &Arc<Self>,
        client: ClientId,
        owner: OwnerId,
        partition: Partition,
        wants: &[Want],
    ) -> Entrance {
        let mut books = self.lock();
        if books.fenced_out.contains(&owner) {
            return Entrance::FencedOut;
        }
        if let Some(book) = books.open.get_mut(&owner) {
            // What was passed on a moment ago is about to be struck out. What was not, is not now.
            book.entries.retain(|entry| {
                let lane = entry.lane.as_ref().filter(|_| entry.partition == partition);
                lane.is_none_or(|lane| lane.share(owner))
            });
        }
        let book = books.open.get(&owner);
        let here = book.and_then(|book| book.entries.iter().find(|e| e.partition == partition));
        let alias = here.and_then(|entry| entry.alias);
        let held = book.map(Book::held).unwrap_or_default();
        let asking = book.is_some_and(|book| book.asking);
        let admission = admit(partition, wants, &held, asking, owner.is_of(client));
        let new = wants
            .iter()
            .any(|want| !held.iter().any(|(at, have)| *at == partition && have.key == want.key));
        let asks = matches!(admission, Admission::Ask { .. }) && new;
        let ticket = asks.then(|| {
            books.open.entry(owner).or_default().asking = true;
            Ticket { owners: Arc::clone(self), owner }
        });
        Entrance::Open(admission, ticket, alias)
    }

    /// Books a grant.
    pub(super) fn hold(&self, owner: OwnerId, entry: Entry) {
        let mut books = self.lock();
        if books.fenced_out.contains(&owner) {
            entry.state.lose();
        }
        let entries = &mut books.open.entry(owner).or_default().entries;
        if entries.is_empty() {
            entries.reserve_exact(1); // most owners have no second one
        }
        entries.push(entry);
    }

    /// Strikes a grant out.
    pub(super) fn release(&self, owner: OwnerId, request: RequestId) {
        let mut books = self.lock();
        if let Some(book) = books.open.get_mut(&owner) {
            book.entries.retain(|entry| entry.request != request);
        }
        books.forget_if_empty(owner);
    }

    /// How often this client entered `key` for `owner`.
    pub(super) fn count(&self, owner: OwnerId, key: &ResourceKey) -> usize {
        let books = self.lock();
        let entries = books.open.get(&owner).map(|book| book.entries.as_slice());
        let on_key = entries.unwrap_or_default().iter().filter(|entry| entry.covers(key));
        on_key.count()
    }

    /// Everything that `owner` holds here, sorted, each key once in its strongest mode.
    pub(super) fn held(&self, owner: OwnerId) -> Vec<Want> {
        let books = self.lock();
        let held = books.open.get(&owner).map(Book::held).unwrap_or_default();
        held.into_iter().map(|(_, want)| want).collect()
    }

    /// A store has rejected the owner's token: no new grants, and everything it holds here is lost.
    /// Its entries at the service are released by their own holders, or lapse.
    pub(super) fn fence_out(&self, owner: OwnerId) {
        let mut books = self.lock();
        if !books.fenced_out.contains(&owner) {
            books.fenced_out.push_back(owner);
        }
        if books.fenced_out.len() > REMEMBERED {
            books.fenced_out.pop_front();
        }
        for entry in books.open.get(&owner).map(|book| book.entries.as_slice()).unwrap_or_default()
        {
            entry.state.lose();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Books {
    fn forget_if_empty(&mut self, owner: OwnerId) {
        if self.open.get(&owner).is_some_and(|book| !book.asking && book.entries.is_empty()) {
            self.open.remove(&owner);
        }
    }
}

impl Book {
    fn held(&self) -> Vec<(Partition, Want)> {
        let every = self
            .entries
            .iter()
            .flat_map(|entry| entry.wants.iter().map(move |want| (entry.partition, want.clone())));
        let mut held: Vec<_> = every.collect();
        // Strongest mode first among equals, so that it is the one that stays.
        held.sort_by(|(p, a), (q, b)| (p, &a.key, b.mode).cmp(&(q, &b.key, a.mode)));
        held.dedup_by(|(q, b), (p, a)| p == q && a.key == b.key);
        held
    }
}

impl Entry {
    fn covers(&self, key: &ResourceKey) -> bool {
        self.wants.iter().any(|want| want.key == *key)
    }
}
