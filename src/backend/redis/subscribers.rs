//! Who hears what is pushed.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use redis::{PushInfo, PushKind, Value};

use super::reply;
use super::request::channel;
use crate::backend::Sink;
use crate::types::ClientId;

/// The sinks of the clients of this process, by channel.
#[derive(Default)]
pub(super) struct Subscribers(Mutex<State>);

#[derive(Default)]
struct State {
    sinks: HashMap<String, (ClientId, Sink)>,
    left: Vec<String>,
}

impl Subscribers {
    /// Adds a client. Returns its channel.
    pub(super) fn add(&self, client: ClientId, sink: Sink) -> String {
        let channel = channel(client);
        let mut state = self.lock();
        state.left.retain(|left| *left != channel);
        state.sinks.insert(channel.clone(), (client, sink));
        channel
    }

    pub(super) fn remove(&self, client: ClientId) {
        let channel = channel(client);
        let mut state = self.lock();
        if state.sinks.remove(&channel).is_some() {
            state.left.push(channel);
        }
    }

    pub(super) fn channels(&self) -> Vec<String> {
        self.lock().sinks.keys().cloned().collect()
    }

    /// The channels that nobody hears any more, once.
    pub(super) fn take_left(&self) -> Vec<String> {
        std::mem::take(&mut self.lock().left)
    }

    /// Passes on what was pushed. What cannot be read is dropped: the refresh is the truth.
    pub(super) fn deliver(&self, push: &PushInfo) {
        if push.kind != PushKind::Message {
            return;
        }
        let [Value::BulkString(channel), payload] = push.data.as_slice() else { return };
        let Ok(channel) = std::str::from_utf8(channel) else { return };
        let Some((client, sink)) = self.lock().sinks.get(channel).cloned() else { return };
        if let Some(push) = reply::push(client, payload) {
            sink(push);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
