//! A file system that doesn't answer: tests/apps/python/hung_fs.py.

use std::process::Command;

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;

use super::folder::Folder;
use super::process::send;
use super::program::python;
use super::service::Service;
use super::wait::{DEADLINE, wait_until};

pub struct HungFileSystem {
    folder: Folder,
    server: Option<Service>,
}

impl HungFileSystem {
    /// A file system that answers. It is mounted for this thread, and all that it starts from now on, alone.
    pub fn new() -> HungFileSystem {
        HungFileSystem::deaf_to("")
    }

    /// One that will answer everything but this: `mknod`, `unlink` or `rename`; nothing if it is empty.
    pub fn deaf_to(what: &str) -> HungFileSystem {
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace (needs root)");
        run("mount", &["--make-rprivate", "/"]);
        let folder = Folder::new();
        let mut command = Command::new("python3");
        command.args(&python("hung_fs.py", &[&folder.path("")])[1..]);
        command.args(what.split_whitespace());
        let server = Service::spawn(command);
        server.wait_for_output("mounted");
        HungFileSystem { folder, server: Some(server) }
    }

    pub fn path(&self, name: &str) -> String {
        self.folder.path(name)
    }

    /// From now on it answers nothing, or not what it is deaf to.
    pub fn hang(&self) {
        let server = self.server.as_ref().expect("it has not ended");
        send(server.pid(), Signal::SIGUSR1);
        server.wait_for_output("hangs");
    }

    /// It is gone, and what waits for it gets an error. Waits until nothing of the service is left.
    #[track_caller]
    pub fn end(&mut self, service: &Service) {
        self.server = None;
        wait_until("nothing is left", DEADLINE, || service.descendants().is_empty());
    }
}

impl Drop for HungFileSystem {
    fn drop(&mut self) {
        self.server = None;
        run("umount", &["--lazy", &self.folder.path("")]);
    }
}

fn run(program: &str, arguments: &[&str]) {
    let status = Command::new(program).args(arguments).status().expect("run a program");
    if !status.success() {
        eprintln!("{program} {arguments:?}: {status}");
    }
}
