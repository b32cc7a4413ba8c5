//! Granting: what is in the way, what becomes free, who is next.

use crate::types::{FencingToken, Mode, OwnerId, ResourceKey, Want};

use super::super::Standing;
use super::super::request::Acquire;
use super::super::token::{Corrupt, last_of_block, next_token};
use super::{Granted, Held, Id, Queue, Waiting, keys, micros};

impl Queue {
    /// The strongest mode in which `owner` holds `key`.
    pub(super) fn strongest(&self, now_us: u64, owner: OwnerId, key: &ResourceKey) -> Option<Mode> {
        self.entries_of(now_us, owner, key).map(|(_, mode)| mode).max()
    }

    /// The entries of `owner` on `key`, without those that have lapsed and were not found yet:
    /// others may have held the key since.
    fn entries_of(
        &self,
        now_us: u64,
        owner: OwnerId,
        key: &ResourceKey,
    ) -> impl Iterator<Item = (Id, Mode)> {
        let entries = self.keys.get(key).into_iter().flat_map(|slot| &slot.entries).copied();
        entries.filter(move |(id, _)| id.0 == owner && self.is_live(now_us, *id))
    }

    pub(super) fn token_on(&self, id: Id, key: &ResourceKey) -> Option<FencingToken> {
        let held = self.held.get(&id)?;
        let at = held.wants.iter().position(|want| want.key == *key)?;
        held.tokens.get(at).copied()
    }

    pub(super) fn is_live(&self, now_us: u64, id: Id) -> bool {
        let deadline = match (self.held.get(&id), self.waiting.get(&id)) {
            (Some(held), _) => held.deadline_us,
            (None, Some(waiting)) => waiting.deadline_us,
            (None, None) => 0,
        };
        deadline > now_us
    }

    /// The first key on which a request that is not in line yet is blocked.
    pub(super) fn blocked_on(&self, now_us: u64, ask: &Acquire) -> Option<ResourceKey> {
        let blocked = ask.part.wants.iter().find(|want| {
            let re_enters = self.strongest(now_us, ask.part.owner, &want.key) >= Some(want.mode);
            let respects_line = if re_enters {
                self.rules.re_entry_behind_waiters
            } else {
                ask.standing == Standing::Fresh || self.rules.incremental_behind_waiters
            };
            self.is_taken(now_us, ask.part.owner, want)
                || (respects_line && self.has_earlier(now_us, ask.part.owner, None, want))
        });
        blocked.map(|want| want.key.clone())
    }

    /// Whether another owner holds the key in a conflicting mode.
    fn is_taken(&self, now_us: u64, owner: OwnerId, want: &Want) -> bool {
        self.keys.get(&want.key).is_some_and(|slot| {
            slot.entries.iter().any(|(id, mode)| {
                id.0 != owner && mode.conflicts(want.mode) && self.is_live(now_us, *id)
            })
        })
    }

    /// Whether the owner holds the key in a weaker mode. Then the grant would be an upgrade, with a
    /// token that other readers may have passed.
    fn upgrades(&self, now_us: u64, owner: OwnerId, want: &Want) -> bool {
        self.strongest(now_us, owner, &want.key).is_some_and(|have| have < want.mode)
    }

    /// Whether a conflicting waiter of another owner stands in line before `me`, or at all.
    fn has_earlier(&self, now_us: u64, owner: OwnerId, me: Option<Id>, want: &Want) -> bool {
        let Some(slot) = self.keys.get(&want.key) else { return false };
        let before = slot.line.iter().take_while(|(id, _)| Some(*id) != me);
        let mut others = before.filter(|(id, mode)| id.0 != owner && mode.conflicts(want.mode));
        others.any(|(id, _)| self.is_live(now_us, *id))
    }

    /// Makes a request a holder. Keys that its owner holds already keep their token. Returns the
    /// tokens, and how many were reserved.
    pub(super) fn hold(
        &mut self,
        now_us: u64,
        id: Id,
        wants: &[Want],
        terms: Granted<'_>,
    ) -> Result<(Vec<FencingToken>, u32), Corrupt> {
        let Granted { deadline_us, floor, block, metadata } = terms;
        let old: Vec<_> =
            wants.iter().map(|want| self.token_of_owner(now_us, id.0, &want.key)).collect();
        let block = if old.iter().all(Option::is_none) { block } else { 1 };
        let mut reserved = 1;
        let fresh = if old.iter().any(Option::is_none) {
            let token = next_token(self.last, now_us, floor)?;
            let last = last_of_block(token, now_us, block);
            reserved = u32::try_from(last.get() - token.get() + 1).unwrap_or(1);
            self.last = Some(last);
            Some(token)
        } else {
            None
        };
        let tokens: Vec<_> = old.into_iter().filter_map(|old| old.or(fresh)).collect();
        for want in wants {
            self.keys.entry(want.key.clone()).or_default().entries.push((id, want.mode));
        }
        let metadata = metadata.clone();
        let held = Held { wants: wants.into(), tokens: tokens.clone(), deadline_us, metadata };
        self.held.insert(id, held);
        Ok((tokens, reserved))
    }

    /// What lapsed is no longer held, though nobody has found it yet: its token is not passed on.
    fn token_of_owner(
        &self,
        now_us: u64,
        owner: OwnerId,
        key: &ResourceKey,
    ) -> Option<FencingToken> {
        self.entries_of(now_us, owner, key).find_map(|(id, _)| self.token_on(id, key))
    }

    /// Takes a request out of everything it is in. Returns the keys on which something got weaker.
    pub(super) fn remove(&mut self, id: Id) -> Vec<ResourceKey> {
        let held = self.held.remove(&id).map(|held| held.wants);
        let waiting = self.waiting.remove(&id).map(|waiting| waiting.wants);
        let dirty = keys(&held.or(waiting).unwrap_or_default());
        for key in &dirty {
            let Some(slot) = self.keys.get_mut(key) else { continue };
            slot.entries.retain(|(other, _)| *other != id);
            slot.line.retain(|(other, _)| *other != id);
            if slot.entries.is_empty() && slot.line.is_empty() {
                self.keys.remove(key);
            }
        }
        dirty
    }

    /// Removes what has lapsed at these keys, from all of its keys, and promotes there.
    pub(super) fn prune(&mut self, now_us: u64, wants: &[Want]) -> Result<(), Corrupt> {
        let found = wants.iter().filter_map(|want| self.keys.get(&want.key));
        let all = found.flat_map(|slot| slot.entries.iter().chain(&slot.line)).map(|(id, _)| *id);
        let lapsed: Vec<Id> = all.filter(|id| !self.is_live(now_us, *id)).collect();
        let dirty: Vec<_> = lapsed.into_iter().flat_map(|id| self.remove(id)).collect();
        if self.rules.lapse_does_not_promote {
            return Ok(());
        }
        self.promote(now_us, dirty)
    }

    /// Grants every waiter that the change at `dirty` lets through.
    ///
    /// One pass in ticket order is enough: a granted waiter becomes a holder with the same
    /// conflicts, so no grant lets another one through.
    pub(super) fn promote(&mut self, now_us: u64, dirty: Vec<ResourceKey>) -> Result<(), Corrupt> {
        let lines = dirty.iter().filter_map(|key| self.keys.get(key)).flat_map(|slot| &slot.line);
        let mut candidates: Vec<(u64, Id)> =
            lines.filter_map(|(id, _)| Some((self.waiting.get(id)?.ticket, *id))).collect();
        candidates.sort_unstable();
        candidates.dedup();
        for (_, id) in candidates {
            if !self.promote_one(now_us, id)? && self.rules.promotion_stops_at_blocked {
                break;
            }
        }
        Ok(())
    }

    fn promote_one(&mut self, now_us: u64, id: Id) -> Result<bool, Corrupt> {
        let Some(waiting) = self.waiting.get(&id).filter(|waiting| waiting.deadline_us > now_us)
        else {
            return Ok(false);
        };
        let fresh = waiting.standing == Standing::Fresh || self.rules.incremental_behind_waiters;
        let blocked = waiting.wants.iter().any(|want| {
            self.is_taken(now_us, id.0, want)
                || (!self.rules.upgrade_waits && self.upgrades(now_us, id.0, want))
                || (fresh && self.has_earlier(now_us, id.0, Some(id), want))
        });
        if blocked {
            return Ok(false);
        }
        next_token(self.last, now_us, waiting.floor)?;
        let waiting = waiting.clone();
        self.remove(id);
        let deadline_us = now_us + micros(waiting.lease.claim());
        let Waiting { floor, block, metadata, .. } = &waiting;
        let terms = Granted { deadline_us, floor: *floor, block: *block, metadata };
        let (_, block) = self.hold(now_us, id, &waiting.wants, terms)?;
        self.handed_over.push((waiting.client, id, block));
        Ok(true)
    }
}
