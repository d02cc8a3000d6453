//! Folders and files of a test.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::program::server;

/// A folder for the files of a test. Many of them are flags: what counts is whether they exist.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new() -> Folder {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name =
            format!("reuse-run-folder-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).expect("make a folder");
        // Without links in it, as /proc/PID/cwd shows it.
        Folder(fs::canonicalize(path).expect("the path of the folder"))
    }

    pub fn path(&self, name: &str) -> String {
        self.0.join(name).into_os_string().into_string().expect("a path in UTF-8")
    }

    /// Writes a file that only its owner can read. Returns its path.
    pub fn write(&self, name: &str, content: &str) -> String {
        self.write_with(name, content, 0o600)
    }

    /// Writes a new file with a mode. Returns its path.
    pub fn write_with(&self, name: &str, content: &str, mode: u32) -> String {
        let path = self.path(name);
        let _ = fs::remove_file(&path);
        fs::write(&path, content).expect("write a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("chmod");
        path
    }

    pub fn raise(&self, flag: &str) {
        fs::write(self.path(flag), "").expect("raise a flag");
    }

    pub fn lower(&self, flag: &str) {
        fs::remove_file(self.path(flag)).expect("lower a flag");
    }

    /// The test server behind a script that obeys flags. While `hold-G-S` exists, the worker of generation G and
    /// slot S waits. If then `broken-G-S` exists, it prints `broken G-S NANOSECONDS` and exits with 3.
    pub fn server(&self, addr: SocketAddr, more: &[&str]) -> Vec<String> {
        let text = r#"me=$REUSE_RUN_GENERATION-$REUSE_RUN_SLOT; folder=$1; shift
            while [ -e "$folder/hold-$me" ]; do sleep 0.02; done
            if [ -e "$folder/broken-$me" ]; then echo "broken $me $(date +%s%N)"; exit 3; fi
            exec "$0" "$@""#;
        let addr = addr.to_string();
        let command = ["sh", "-c", text, &server(), &self.path(""), "--listen", &addr];
        command.iter().chain(more).map(|word| (*word).to_owned()).collect()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A program that changes as by a deployment: the test server with the arguments that a file holds when a worker
/// starts.
pub struct Deployment {
    file: PathBuf,
}

impl Deployment {
    pub fn new(arguments: &str) -> Deployment {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("reuse-run-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let deployment = Deployment { file: std::env::temp_dir().join(name) };
        deployment.replace(arguments);
        deployment
    }

    /// Installs a new version. It has no effect on workers that run.
    pub fn replace(&self, arguments: &str) {
        fs::write(&self.file, arguments).expect("write the server's arguments");
    }

    /// The command for reuse-run.
    pub fn command(&self) -> Vec<String> {
        let file = self.file.display().to_string();
        ["sh", "-c", r#"exec "$0" $(cat "$1")"#, &server(), &file].map(str::to_owned).to_vec()
    }
}

impl Drop for Deployment {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.file);
    }
}
