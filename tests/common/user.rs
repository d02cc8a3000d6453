//! Another user of this machine, without any rights.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use super::folder::Folder;
use super::program::{reuse_run, server};

/// A user who owns no other processes, with copies of `reuse-run` and the test server. (Other users
/// may not enter the folder where the programs were built.)
pub struct User {
    pub folder: Folder,
    pub id: u32,
}

impl User {
    pub fn new() -> User {
        let folder = Folder::new();
        fs::set_permissions(&folder.0, fs::Permissions::from_mode(0o755)).expect("open the folder");
        for (program, name) in [(reuse_run().get_program(), "reuse-run"), (server().as_ref(), "server")] {
            fs::copy(program, folder.path(name)).expect("copy a program");
            fs::set_permissions(folder.path(name), fs::Permissions::from_mode(0o755)).expect("chmod");
        }
        User { folder, id: 54321 }
    }

    /// The path of this user's copy of the test server.
    pub fn server(&self) -> String {
        self.folder.path("server")
    }

    /// `reuse-run ARGUMENTS` as this user, with more options for setpriv(1).
    pub fn command(&self, privileges: &[&str], arguments: &[String]) -> Command {
        let mut command = Command::new("setpriv");
        command.args([&format!("--reuid={}", self.id), &format!("--regid={}", self.id)]);
        command.arg("--clear-groups").args(privileges).args(["--", &self.folder.path("reuse-run")]);
        command.args(arguments).current_dir("/").env_remove("REUSE_RUN_LOG");
        command
    }
}
