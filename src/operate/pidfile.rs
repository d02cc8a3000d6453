//! The file of --pidfile. It holds the PID of reuse-run from the moment when the first workers are ready.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use log::warn;
use nix::unistd::{AccessFlags, Pid, access};

use crate::kernel::file::open_regular;
use crate::kernel::procfs::{self, Life};
use crate::operate::find;

#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    is_written: bool,
}

impl PidFile {
    /// Checks that the file can be written, but doesn't write it yet.
    ///
    /// # Errors
    /// When the folder isn't writable, or the path is a folder.
    pub fn new(path: PathBuf) -> io::Result<Self> {
        let path = std::path::absolute(path)?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        let why =
            |error: io::Error| io::Error::new(error.kind(), format!("--pidfile {}: {error}", path.display()));
        access(folder, AccessFlags::W_OK | AccessFlags::X_OK).map_err(|errno| why(errno.into()))?;
        if path.is_dir() {
            return Err(why(io::Error::from_raw_os_error(libc::EISDIR)));
        }
        Ok(Self { path, is_written: false })
    }

    /// Writes the file at the first call. A reader never finds an empty file or half a number.
    pub fn write(&mut self) {
        if self.is_written {
            return;
        }
        if let Some(other) = self.other() {
            warn!("--pidfile {}: it was that of process {other}, which still runs", self.path.display());
        }
        let mut name = self.path.as_os_str().to_owned();
        name.push(format!(".{}", std::process::id()));
        let write = || -> io::Result<()> {
            let _ = fs::remove_file(&name);
            // create_new doesn't follow a link that another user has put there.
            let mut file = fs::OpenOptions::new().write(true).create_new(true).open(&name)?;
            writeln!(file, "{}", std::process::id())?;
            fs::rename(&name, &self.path)
        };
        match write() {
            Ok(()) => self.is_written = true,
            Err(error) => {
                let _ = fs::remove_file(&name);
                warn!("can't write --pidfile {}: {error}", self.path.display());
            }
        }
    }

    /// The PID in the file.
    fn read(&self) -> Option<u32> {
        const MAX_LENGTH: u64 = 16;
        let mut text = String::new();
        // The folder may be another user's.
        let file = open_regular(&self.path, libc::O_NOFOLLOW).ok()?;
        file.take(MAX_LENGTH).read_to_string(&mut text).ok()?;
        text.strip_suffix('\n')?.parse().ok()
    }

    /// The other reuse-run whose file it is, if that runs.
    fn other(&self) -> Option<u32> {
        let is_other = |pid: &u32| {
            let lives = procfs::life(Pid::from_raw(*pid as i32)) == Life::Lives;
            *pid != std::process::id() && lives && find::is_called_as_this(*pid)
        };
        self.read().filter(is_other)
    }
}

impl Drop for PidFile {
    /// Removes the file, unless it holds another PID: then another process has replaced it.
    fn drop(&mut self) {
        if self.is_written && self.read() == Some(std::process::id()) {
            let _ = fs::remove_file(&self.path);
        }
    }
}
