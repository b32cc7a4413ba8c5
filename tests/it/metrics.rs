//! The metrics that are reported are those of the table in `src/docs/metrics.md`, and no others.

use std::collections::BTreeSet;
use std::time::Duration;

use metrics_util::debugging::DebuggingRecorder;
use palisade::backend::MemoryBackend;
use palisade::{Coordinator, LockOptions, Locks};

use crate::shaky::{Mood, Shaky};

/// The names in the first column of the table.
fn documented() -> BTreeSet<String> {
    let table = include_str!("../../src/docs/metrics.md");
    let names = table.lines().filter_map(|line| line.strip_prefix("| `palisade_"));
    names.map(|rest| format!("palisade_{}", rest.split('`').next().unwrap())).collect()
}

#[test]
fn every_metric_is_documented_and_every_documented_one_is_reported() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    metrics::with_local_recorder(&recorder, || runtime.unwrap().block_on(use_everything()));
    let seen: BTreeSet<String> = snapshotter
        .snapshot()
        .into_vec()
        .into_iter()
        .map(|(key, ..)| key.key().name().to_owned())
        .collect();
    assert_eq!(seen, documented());
}

async fn use_everything() {
    let backend = std::sync::Arc::new(MemoryBackend::new());
    let options = LockOptions::default();
    let locks = Locks::with_options(std::sync::Arc::clone(&backend) as _, options).await.unwrap();
    let coordinator = Coordinator::builder(locks.clone()).build();
    coordinator.transaction(["a"]).begin().await.unwrap().commit().await.unwrap();

    let guard = locks.lock("a").ttl(Duration::from_secs(1)).acquire().await.unwrap();
    assert!(locks.lock("a").try_acquire().await.unwrap().is_none());
    locks.lock("a").wait(Duration::from_millis(1)).acquire().await.unwrap_err();
    tokio::time::sleep(Duration::from_secs(2)).await;
    backend.forget();
    guard.lost().await;
    guard.release().await.unwrap_err();
    let statistics = locks.statistics();
    assert_eq!((statistics.acquired, statistics.failed, statistics.lost), (2, 2, 1));
    assert_eq!((statistics.released, statistics.active, statistics.waiting), (2, 0, 0));
    assert!(statistics.renewed > 0);
    assert!(statistics.mean_hold > Duration::from_millis(900), "{statistics:?}");

    let shaky = Shaky::new();
    let locks = shaky.locks(LockOptions::default()).await;
    shaky.set(Mood::Fails);
    while locks.lock("a").try_acquire().await.unwrap_err().retry_after().is_none() {}
}
