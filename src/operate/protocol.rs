//! What a control command and a running reuse-run say to each other: one request and its replies, each a line
//! of JSON, over a Unix socket in the abstract namespace (unix(7)), which needs no directory to write to.

use std::fs;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::operate::status::Status;

/// Of this protocol: one more with each change that older commands or servers can't make sense of.
pub const VERSION: u32 = 1;
/// No request is longer, in bytes.
pub const LONGEST_REQUEST: usize = 4096;

/// What comes first on the wire.
#[derive(Debug, Serialize, Deserialize)]
pub struct Envelope {
    pub version: u32,
    pub request: Request,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Request {
    Status,
    /// The same, without what takes long to find out: connections, and what processes have used.
    Brief,
    /// Without `how`, as a signal's reload goes. Whoever doesn't wait gets one reply at once.
    Reload {
        how: Option<How>,
        wait: bool,
    },
    /// End the reload that goes on.
    Abort,
    Scale {
        to: Target,
        wait: bool,
    },
    Stop {
        wait: bool,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum How {
    Batch(u32),
    /// A share in percent, for so many seconds.
    Canary {
        percent: f64,
        seconds: f64,
    },
}

/// A number of workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    Exactly(u32),
    More(u32),
    Fewer(u32),
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reply {
    Status(Box<Status>),
    /// A line of the log, while the command waits.
    Step(String),
    /// The last: it is done.
    Done(String),
    /// The last: it is not, and why; then what the worker at fault wrote last.
    Failed(String, Vec<String>),
}

/// What the names of all sockets in this PID namespace begin with.
fn prefix() -> io::Result<String> {
    Ok(format!("reuse-run/{}/", fs::metadata("/proc/self/ns/pid")?.ino()))
}

/// The address of a reuse-run of this PID namespace.
pub fn address(pid: u32) -> io::Result<SocketAddr> {
    SocketAddr::from_abstract_name(format!("{}{pid}", prefix()?))
}

/// The pid in the name of a socket as /proc/net/unix has it, if it is a reuse-run's of this PID namespace.
pub fn pid_of(name: &str) -> Option<u32> {
    name.strip_prefix('@')?.strip_prefix(&prefix().ok()?)?.parse().ok()
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// Reads a request.
///
/// # Errors
/// What to tell the client.
pub fn parse(line: &[u8]) -> Result<Request, String> {
    let Version { version } =
        serde_json::from_slice(line).map_err(|error| format!("not a request: {error}"))?;
    if version != VERSION {
        let ours = env!("CARGO_PKG_VERSION");
        return Err(format!(
            "the running reuse-run {ours} speaks version {VERSION} of the control protocol, not {version}: use its own \
             program"
        ));
    }
    let envelope: Envelope =
        serde_json::from_slice(line).map_err(|error| format!("not a request: {error}"))?;
    Ok(envelope.request)
}

/// A request or a reply as a line.
pub fn line(message: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(message).unwrap_or_default(); // of plain structs it can't fail
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_request_is_read_as_it_was_written() {
        for request in [
            Request::Status,
            Request::Brief,
            Request::Reload { how: None, wait: true },
            Request::Reload { how: Some(How::Batch(2)), wait: false },
            Request::Reload { how: Some(How::Canary { percent: 2.5, seconds: 0.25 }), wait: true },
            Request::Abort,
            Request::Scale { to: Target::Fewer(3), wait: true },
            Request::Stop { wait: true },
        ] {
            let line = line(&Envelope { version: VERSION, request: request.clone() });
            assert_eq!(parse(&line), Ok(request));
        }
    }

    #[test]
    fn another_version_is_told_so_whatever_else_it_says() {
        let error = parse(br#"{"version": 2, "what": ["ever"]}"#).unwrap_err();
        assert!(error.contains("speaks version 1") && error.contains("not 2"), "{error}");
    }

    #[test]
    fn a_name_is_that_of_its_own_namespace_only() {
        let ours = format!("@{}42", prefix().unwrap());
        assert_eq!(pid_of(&ours), Some(42));
        assert_eq!(pid_of("@reuse-run/1/42"), None);
        assert_eq!(pid_of(&ours[1..]), None);
        assert_eq!(pid_of("@reuse-run"), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
