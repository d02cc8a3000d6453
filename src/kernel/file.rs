//! Files at paths where somebody else may have put another one.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens a regular file for reading, with more flags of open(2). To open a FIFO would wait for a writer, and to read some
/// devices never ends.
///
/// # Errors
/// Those of open(2); and if it is another kind of file.
pub fn open_regular(path: &Path, flags: libc::c_int) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | flags).open(path)?;
    if file.metadata()?.is_file() { Ok(file) } else { Err(io::Error::other("not a regular file")) }
}
