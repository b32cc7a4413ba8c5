//! A directory per server or database file, removed with its handle.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

const PREFIX: &str = "palisade-it-";

/// How old the directory of a dead test must be to be swept. Process ids mean nothing across
/// containers that share a temporary directory; this is longer than any test runs.
const SWEEP_AFTER: Duration = Duration::from_secs(3600);

/// A directory whose path is short enough for a unix socket, which a path under the build directory
/// need not be.
#[derive(Debug)]
pub struct Directory(PathBuf);

impl Directory {
    pub fn new() -> Self {
        static PARENT: LazyLock<PathBuf> = LazyLock::new(|| {
            let parent = parent();
            sweep(&parent);
            parent
        });
        loop {
            let name = format!("{PREFIX}{}-{:08x}", std::process::id(), fastrand::u32(..));
            let path = PARENT.join(name);
            match fs::create_dir(&path) {
                Ok(()) => {
                    // The database server may run as a user of its own and has to get in.
                    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
                    return Self(path);
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => panic!("cannot create {}: {error}", path.display()),
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // What is left, if anything, is swept by a later run.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Where the directories are: in memory if there is room, for the thousand files of a database
/// cluster take a second on a disk and a tenth of it there; `TMPDIR` overrides it.
fn parent() -> PathBuf {
    const MEMORY: &str = "/dev/shm";
    const ROOM_KIB: u64 = 2 << 20;
    let free = Command::new("df").args(["--output=avail", "-k", MEMORY]).output().ok();
    let free = free.and_then(|free| String::from_utf8(free.stdout).ok());
    let free = free.and_then(|free| free.lines().nth(1)?.trim().parse::<u64>().ok());
    match std::env::var_os("TMPDIR") {
        None if free.is_some_and(|free| free >= ROOM_KIB) => PathBuf::from(MEMORY),
        _ => std::env::temp_dir(),
    }
}

/// Removes what killed test processes have left.
fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let id = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split_once('-'));
        let Some((id, _)) = id else { continue };
        let old = entry
            .metadata()
            .and_then(|metadata| metadata.modified())
            .is_ok_and(|at| at.elapsed().is_ok_and(|age| age > SWEEP_AFTER));
        if old && !Path::new("/proc").join(id).exists() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
