//! What it was measured on.

use std::fs;
use std::process::Command;

/// Prints the facts without which no figure means anything.
pub fn print(quick: bool) {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let model = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = model.lines().find(|line| line.starts_with("model name"));
    let model = model.and_then(|line| line.split(": ").nth(1)).unwrap_or("unknown processor");
    let commit = output("git", &["describe", "--always", "--dirty", "--abbrev=9"]);
    let redis = output("redis-server", &["--version"]);
    let redis = redis.split_whitespace().find_map(|word| word.strip_prefix("v="));
    let windows = if quick { "short windows (--quick)" } else { "full windows" };
    println!("palisade {commit}, {windows}");
    println!("{cores} cores, {model}; load {}", load());
    println!("redis-server {} on loopback, nothing persisted", redis.unwrap_or("?"));
    println!("multi-thread runtime with 2 workers unless said otherwise");
}

/// How busy the machine was before: somebody else's work is in every figure.
fn load() -> String {
    let averages = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    averages.split_whitespace().next().unwrap_or("?").to_owned()
}

/// What a program prints, or nothing where it is not to be had.
fn output(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).current_dir(env!("CARGO_MANIFEST_DIR")).output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    text.unwrap_or_default()
}
