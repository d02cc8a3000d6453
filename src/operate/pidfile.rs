//! A file that holds the wrapper's PID while its workers serve.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use log::warn;
use nix::unistd::{AccessFlags, access};

#[derive(Debug)]
pub struct PidFile {
    path: PathBuf,
    is_written: bool,
}

impl PidFile {
    /// # Errors
    /// When it could not be written, as far as can be seen before.
    pub fn new(path: PathBuf) -> io::Result<Self> {
        // Whoever reads it later may be elsewhere, and so may this process.
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

    /// Writes it, unless it is there already. Whoever reads it finds a whole number.
    pub fn write(&mut self) {
        if self.is_written {
            return;
        }
        let mut name = self.path.as_os_str().to_owned();
        name.push(format!(".{}", std::process::id()));
        let write = || -> io::Result<()> {
            let _ = fs::remove_file(&name);
            // A new file, so that no link that somebody has put there is followed.
            let mut file = fs::OpenOptions::new().write(true).create_new(true).open(&name)?;
            writeln!(file, "{}", std::process::id())?;
            fs::rename(&name, &self.path)
        };
        let written = write();
        match written {
            Ok(()) => self.is_written = true,
            Err(error) => {
                let _ = fs::remove_file(&name);
                warn!("can't write {}: {error}", self.path.display());
            }
        }
    }
}

impl Drop for PidFile {
    /// Removes it, unless it is another's by now.
    fn drop(&mut self) {
        let is_ours = |text: String| text.trim_end() == std::process::id().to_string();
        if self.is_written && fs::read_to_string(&self.path).is_ok_and(is_ours) {
            let _ = fs::remove_file(&self.path);
        }
    }
}
