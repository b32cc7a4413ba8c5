//! Histories: what each process did, as lines of JSON in a file of its own.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::sync::Mutex;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::Result;

/// How an operation ended, as far as the one who did it knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    Ok,
    /// It is known to have changed nothing.
    No,
    Unknown,
}

/// The file of one process.
#[derive(Debug)]
pub struct History(Mutex<File>);

impl History {
    /// Appends to `name.jsonl` in `directory`.
    pub fn open(directory: &Path, name: &str) -> Result<Self> {
        let path = directory.join(format!("{name}.jsonl"));
        Ok(Self(Mutex::new(File::options().create(true).append(true).open(path)?)))
    }

    /// Writes a line, in one call, so that a process that is killed leaves whole lines.
    pub fn note(&self, line: &impl Serialize) {
        let mut text = serde_json::to_string(line).unwrap();
        text.push('\n');
        self.0.lock().unwrap().write_all(text.as_bytes()).unwrap();
    }
}

/// All lines of the files whose name begins with `prefix`. A last line that was cut short is left
/// out.
pub fn read<T: DeserializeOwned>(directory: &Path, prefix: &str) -> Result<Vec<T>> {
    let mut lines = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !name.starts_with(prefix) || !name.ends_with(".jsonl") {
            continue;
        }
        let text = fs::read_to_string(&path)?;
        for line in text.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
            lines.push(serde_json::from_str(line).map_err(|error| format!("{name}: {error}"))?);
        }
    }
    Ok(lines)
}
