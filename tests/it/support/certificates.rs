//! Certificates for servers on this machine and their clients, made by openssl.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::directory::Directory;
use super::process::{find_program, run};

/// A root, and what it has signed.
#[derive(Debug)]
pub struct Certificates {
    directory: Directory,
}

impl Certificates {
    pub fn new() -> Self {
        let all = Self { directory: Directory::new() };
        fs::write(all.path("names"), "subjectAltName=IP:127.0.0.1,DNS:localhost\n").unwrap();
        fs::write(all.path("other"), "subjectAltName=DNS:elsewhere.example\n").unwrap();
        all.openssl("req -x509", &["-keyout", "root.key", "-out", "root.pem", "-days", "2"]);
        all
    }

    /// A certificate for 127.0.0.1 with its key, signed by the root. Returns the name of both.
    pub fn sign(&self, name: &str) -> String {
        self.sign_with(name, "2", "names")
    }

    /// One that has ended.
    pub fn sign_expired(&self, name: &str) -> String {
        self.sign_with(name, "-1", "names")
    }

    /// One for another host.
    pub fn sign_for_other_host(&self, name: &str) -> String {
        self.sign_with(name, "2", "other")
    }

    fn sign_with(&self, name: &str, days: &str, names: &str) -> String {
        let [key, request, pem] = ["key", "csr", "pem"].map(|end| format!("{name}.{end}"));
        self.openssl("req", &["-keyout", &key, "-out", &request]);
        let root = ["-CA", "root.pem", "-CAkey", "root.key", "-CAcreateserial"];
        let rest = ["-in", &request, "-out", &pem, "-days", days, "-extfile", names];
        self.openssl("x509 -req", &[&root[..], &rest].concat());
        name.to_owned()
    }

    fn openssl(&self, command: &str, args: &[&str]) {
        let mut openssl = Command::new(find_program("openssl"));
        openssl.current_dir(self.directory.path()).args(command.split(' ')).args(args);
        if command.starts_with("req") {
            let curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
            openssl.args(curve).args(["-subj", "/CN=palisade"]);
        }
        run(&mut openssl);
    }

    /// The bytes of a file, such as `root.pem`.
    pub fn read(&self, file: &str) -> Vec<u8> {
        fs::read(self.path(file)).unwrap()
    }

    pub fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join(file)
    }
}
