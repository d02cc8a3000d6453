//! The protocol between a command such as `reuse-run reload` and a running reuse-run: one request and its replies, each
//! a line of JSON, over a Unix socket. The socket's name is in the abstract namespace (unix(7)), so no writable
//! directory is needed.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use serde::{Deserialize, Serialize};

use crate::operate::status::Status;

/// The version of this protocol. It rises with each change that an older command or an older reuse-run can't understand.
pub const VERSION: u32 = 3;
/// In bytes; a longer request is refused.
pub const MAX_REQUEST: usize = 64 * 1024;

/// A request as it is sent.
#[derive(Debug, Serialize, Deserialize)]
pub struct Envelope {
    pub version: u32,
    pub request: Request,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Request {
    Status,
    /// As `Status`, but without the fields that take long to find out: connections, memory and CPU time are 0.
    Brief,
    /// Without `how` the workers are replaced as at SIGUSR2. A client that doesn't `wait` gets one reply at once.
    Reload {
        how: Option<How>,
        /// Whether the new workers need not listen where the old ones do.
        #[serde(default)]
        ports_may_change: bool,
        /// What the new workers run, if it is something else.
        #[serde(default)]
        command: Option<Vec<String>>,
        wait: bool,
    },
    /// End the current reload and keep the workers that serve.
    Abort,
    Scale {
        to: Target,
        wait: bool,
    },
    /// Without slots, those of all slots.
    Recycle {
        slots: Vec<u32>,
        wait: bool,
    },
    Stop {
        wait: bool,
    },
}

impl Request {
    /// The oldest version of the protocol in which it can be sent.
    pub fn version(&self) -> u32 {
        match self {
            Self::Recycle { .. } => 3,
            Self::Reload { ports_may_change: true, .. } | Self::Reload { command: Some(_), .. } => 2,
            _ => 1,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum How {
    /// At most this many workers at a time.
    Batch(u32),
    /// The new workers get a share of the connections, in percent, for this many seconds.
    Canary { percent: f64, seconds: f64 },
}

/// A number of workers, or by how many to change it.
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
    /// What happens while the client waits, as in the log.
    Step(String),
    /// The last reply: the request is done.
    Done(String),
    /// The last reply: why the request failed, and the last lines of the worker that caused it.
    Failed(String, Vec<String>),
}

/// The beginning of all socket names in this PID namespace.
fn prefix() -> io::Result<String> {
    Ok(format!("reuse-run/{}/", fs::metadata("/proc/self/ns/pid")?.ino()))
}

/// What a user calls a reuse-run instead of by its PID: a letter, and up to 31 letters, digits, "-", "_" and ".".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name(String);

impl Name {
    pub fn new(text: &str) -> Option<Self> {
        let is_meant = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let is_name = text.starts_with(|c: char| c.is_ascii_alphabetic())
            && text.len() <= 32
            && text.chars().all(is_meant);
        is_name.then(|| Self(text.to_owned()))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Where a reuse-run listens in this PID namespace: under its PID and its name, if it has one. If another process has taken
/// that, `/` and a random number follow.
///
/// # Errors
/// Without /proc.
pub fn socket_name(pid: u32, name: Option<&Name>) -> io::Result<String> {
    let name = name.map_or(String::new(), |name| format!("/{name}"));
    Ok(format!("{}{pid}{name}", prefix()?))
}

/// The name of a socket that only one reuse-run of a user has, in this PID namespace: the one that is called so.
///
/// # Errors
/// Without /proc.
pub fn claim_name(uid: u32, name: &Name) -> io::Result<String> {
    Ok(format!("{}name/{uid}/{name}", prefix()?))
}

/// The PID and the name in a socket's name, if it is that of a reuse-run in this PID namespace. Any process may have taken it.
pub fn parse_socket_name(socket: &str) -> Option<(u32, Option<Name>)> {
    let rest = socket.strip_prefix(&prefix().ok()?)?;
    let mut parts = rest.split('/');
    let pid = parts.next()?.parse().ok()?;
    Some((pid, parts.next().and_then(Name::new)))
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// Reads a request.
///
/// # Errors
/// What to reply to the client.
pub fn parse(line: &[u8]) -> Result<Request, String> {
    let Version { version } =
        serde_json::from_slice(line).map_err(|error| format!("not a request: {error}"))?;
    if !(1..=VERSION).contains(&version) {
        let ours = env!("CARGO_PKG_VERSION");
        return Err(format!(
            "the running reuse-run {ours} speaks versions 1 to {VERSION} of the control protocol, not {version}: use \
             the command of version {ours}"
        ));
    }
    let envelope: Envelope =
        serde_json::from_slice(line).map_err(|error| format!("not a request: {error}"))?;
    Ok(envelope.request)
}

/// A request or a reply as a line.
pub fn line(message: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(message).unwrap_or_default(); // can't fail for these types
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_request_is_parsed_to_what_was_written() {
        let reload =
            |how, ports_may_change, command| Request::Reload { how, ports_may_change, command, wait: true };
        for (version, request) in [
            (1, Request::Status),
            (1, Request::Brief),
            (1, reload(None, false, None)),
            (1, reload(Some(How::Batch(2)), false, None)),
            (2, reload(Some(How::Canary { percent: 2.5, seconds: 0.25 }), true, None)),
            (2, reload(None, false, Some(vec!["node".to_owned()]))),
            (1, Request::Abort),
            (1, Request::Scale { to: Target::Fewer(3), wait: true }),
            (1, Request::Stop { wait: true }),
            (3, Request::Recycle { slots: vec![0, 2], wait: true }),
        ] {
            assert_eq!(request.version(), version, "{request:?}");
            let line = line(&Envelope { version, request: request.clone() });
            assert_eq!(parse(&line), Ok(request));
        }
        let old = br#"{"version": 1, "request": {"reload": {"how": null, "wait": true}}}"#;
        assert_eq!(parse(old), Ok(reload(None, false, None)));
    }

    #[test]
    fn a_request_of_another_version_is_refused_whatever_else_it_holds() {
        let error = parse(br#"{"version": 4, "what": ["ever"]}"#).unwrap_err();
        assert!(error.contains("speaks versions 1 to 3") && error.contains("not 4"), "{error}");
    }

    #[test]
    fn only_sockets_of_this_pid_namespace_have_a_pid() {
        for name in [None, Name::new("web")] {
            let ours = socket_name(42, name.as_ref()).unwrap();
            assert_eq!(parse_socket_name(&ours), Some((42, name.clone())));
            assert_eq!(parse_socket_name(&format!("{ours}/0123456789")), Some((42, name)));
            let claim = claim_name(42, &Name::new("web").unwrap()).unwrap();
            for other in
                [&claim, "reuse-run/1/42", &format!("@{ours}"), &ours.replace("42", "42x"), "reuse-run", ""]
            {
                assert_eq!(parse_socket_name(other), None, "{other}");
            }
        }
    }

    #[test]
    fn a_name_can_be_told_from_a_pid_and_an_option() {
        for text in ["web", "a", "Web-1.example_com"] {
            assert_eq!(Name::new(text).unwrap().to_string(), text);
        }
        for text in ["", "1", "1a", "-n", "a b", "a/b", "ä", &"a".repeat(33)] {
            assert_eq!(Name::new(text), None, "{text}");
        }
    }

    /// A client may be any process of this user.
    mod fuzz {
        use super::*;

        fn how() -> impl Strategy<Value = How> {
            prop_oneof![
                any::<u32>().prop_map(How::Batch),
                (0u32..20_000, any::<u32>()).prop_map(|(percent, ms)| How::Canary {
                    percent: f64::from(percent) / 100.0,
                    seconds: f64::from(ms) / 1000.0,
                }),
            ]
        }

        fn request() -> impl Strategy<Value = Request> {
            let command = proptest::option::of(proptest::collection::vec(any::<String>(), 0..4));
            let reload = (proptest::option::of(how()), any::<bool>(), command, any::<bool>()).prop_map(
                |(how, ports_may_change, command, wait)| Request::Reload {
                    how,
                    ports_may_change,
                    command,
                    wait,
                },
            );
            let target = (0..3, any::<u32>()).prop_map(|(kind, number)| {
                [Target::Exactly, Target::More, Target::Fewer][kind as usize](number)
            });
            prop_oneof![
                Just(Request::Status),
                Just(Request::Brief),
                Just(Request::Abort),
                any::<bool>().prop_map(|wait| Request::Stop { wait }),
                (proptest::collection::vec(any::<u32>(), 0..4), any::<bool>())
                    .prop_map(|(slots, wait)| Request::Recycle { slots, wait }),
                (target, any::<bool>()).prop_map(|(to, wait)| Request::Scale { to, wait }),
                reload,
            ]
        }

        proptest! {
            #[test]
            fn a_request_is_one_line_and_is_read_as_it_was_written(request in request(), version in 1..=VERSION) {
                let line = line(&Envelope { version, request: request.clone() });
                prop_assert_eq!(line.iter().position(|byte| *byte == b'\n'), Some(line.len() - 1));
                prop_assert_eq!(parse(&line[..line.len() - 1]), Ok(request));
            }

            #[test]
            fn no_request_of_another_version_is_obeyed(request in request(), version: u32) {
                let line = line(&Envelope { version, request: request.clone() });
                prop_assert_eq!(parse(&line).ok(), (1..=VERSION).contains(&version).then_some(request));
            }

            #[test]
            fn a_request_that_is_damaged_is_refused_or_is_another_whole_request(
                request in request(), at: prop::sample::Index, byte: u8
            ) {
                let mut line = line(&Envelope { version: VERSION, request });
                let at = at.index(line.len());
                line[at] = byte;
                if let Ok(other) = parse(&line) {
                    let again = super::line(&Envelope { version: VERSION, request: other.clone() });
                    prop_assert_eq!(parse(&again), Ok(other));
                }
            }

            #[test]
            fn bytes_that_are_no_json_are_no_request(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
                let is_json = serde_json::from_slice::<serde_json::Value>(&bytes).is_ok();
                prop_assert!(is_json || parse(&bytes).is_err_and(|why| why.starts_with("not a request: ")));
            }

            #[test]
            fn a_name_has_the_pid_that_it_was_made_for(pid: u32, number: u64, other: String) {
                let (ours, pid_of) = (socket_name(pid, None).unwrap(), |socket: &str| Some(parse_socket_name(socket)?.0));
                prop_assert_eq!(pid_of(&ours), Some(pid));
                prop_assert_eq!(pid_of(&format!("{ours}/{number}")), Some(pid));
                prop_assert!(pid_of(&other).is_none() || other.starts_with(&prefix().unwrap()));
            }
        }
    }
}
