//! Another user of this machine, without any rights.

use std::fs;
use std::io::{self, Write};
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

/// Ends a test that needs other users than root where there are none, and says so. Elsewhere it does nothing.
macro_rules! needs_other_users {
    () => {
        if crate::common::is_left_out(std::any::type_name_of_val(&|| ())) {
            return;
        }
    };
}
pub(crate) use needs_other_users;

/// In a user namespace as `unshare --map-root-user` makes it, root is the only user (uid_map in user_namespaces(7)).
pub fn is_left_out(test: &str) -> bool {
    let map = fs::read_to_string("/proc/self/uid_map").expect("the users of this namespace");
    let has_one_user = map.split_whitespace().skip(2).eq(["1"]);
    if has_one_user {
        let test = test.trim_end_matches("::{{closure}}");
        // Not by a macro, whose text is shown only if the test fails.
        let _ = writeln!(io::stderr(), "{test} is left out: it needs other users than root");
    }
    has_one_user
}
