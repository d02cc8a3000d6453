//! What the fleet is told, what it decides, and the answer that a command gets.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::policy::{Rollout, Target};
use super::udp::UdpChange;
use crate::address::{Address, Endpoint};
use crate::ids::{SlotId, WorkerId};
use crate::steering::Plan;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Exited(i32),
    /// By the signal with this number.
    Killed(i32),
}

impl End {
    /// The status with which a shell would report it.
    pub fn status(self) -> u8 {
        match self {
            Self::Exited(status) => status as u8,
            Self::Killed(signal) => (128 + signal) as u8,
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "exited with status {status}"),
            Self::Killed(signal) => match Signal::try_from(*signal) {
                Ok(signal) => write!(f, "was killed by {signal}"),
                Err(_) => write!(f, "was killed by signal {signal}"),
            },
        }
    }
}

/// What has happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// [`Action::Start`] was carried out.
    Started { worker: WorkerId, pid: i32 },
    /// [`Action::Start`] failed. `status` is what reuse-run exits with if it gives up because of it.
    StartFailed { worker: WorkerId, why: String, status: u8 },
    /// A worker has begun to listen.
    Listens { worker: WorkerId, endpoint: Endpoint },
    /// A worker has closed a listener, or shut it down.
    StoppedListening { worker: WorkerId, endpoint: Endpoint },
    /// Something has become of a UDP port.
    Udp { worker: WorkerId, address: Address, change: UdpChange },
    /// A worker has said that it is ready.
    SaysReady { worker: WorkerId },
    /// [`Action::Probe`] was carried out: the worker has answered, or what it has done instead.
    Probed { worker: WorkerId, outcome: Result<(), String> },
    /// [`Action::Switch`] was carried out, or the kernel has refused it.
    Switched { outcome: Result<(), String> },
    /// The kernel has refused what [`Action::Steer`] said, and steers as before.
    SteerFailed { why: String },
    /// A worker that [`Action::Drain`] named has finished its work.
    Drained { worker: WorkerId },
    /// A worker's main process has ended and left this one, which goes on in the background. `instead` says how to prevent that.
    WentIntoBackground { worker: WorkerId, pid: i32, instead: String },
    /// A worker should be replaced.
    Sick { worker: WorkerId, sickness: Sickness },
    /// For as long as [`super::Policy::hung_timeout`] says, or else 10 s, a connection has waited for a worker, and that has done nothing.
    Hangs { worker: WorkerId },
    /// A worker that hung does something again.
    Recovered { worker: WorkerId },
    /// A worker's process has ended.
    Ended { worker: WorkerId, end: End },
    /// The signal with this name asks reuse-run to stop; a second one, at least a second later, to kill.
    StopSignal { signal: &'static str },
    /// Time has passed: see [`super::Fleet::deadline`].
    Tick,
}

/// Why a worker should be replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sickness {
    /// It uses so much memory, in MiB.
    Memory(u64),
    Old,
}

/// As part of a sentence about it.
impl fmt::Display for Sickness {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Memory(mib) => write!(f, "uses {mib} MiB of memory (see --max-memory)"),
            Self::Old => f.write_str("has served for long enough (see --max-age)"),
        }
    }
}

/// Stands for a command that workers can run. The fleet doesn't need to know which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommandId(pub u32);

/// How to replace the workers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReloadOptions {
    /// `None`: as a queued reload does, or else as the command line says.
    pub rollout: Option<Rollout>,
    /// Whether the new workers need not listen where the old ones do.
    pub ports_may_change: bool,
    /// What the new workers run; `None`: what the old ones do.
    pub command: Option<CommandId>,
}

/// What a signal or a control command asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    Reload(ReloadOptions),
    /// End the reload that runs or is queued, and keep the workers that serve.
    Abort,
    Scale(Target),
    /// Replace the workers of these slots, or of all if there are none.
    Recycle(BTreeSet<SlotId>),
    /// Stop everything, as the first [`Event::StopSignal`] does.
    Stop,
}

/// Names one operation until [`Action::Ended`], or [`Action::Exit`] if a stop began before; never used twice. Equal queued commands share it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub(super) u32);

/// How a command was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accepted {
    Begun(Ticket),
    /// It begins when the current operation ends.
    Queued(Ticket),
    /// The stop that was asked for before hasn't ended.
    Joined(Ticket),
    /// The reload was aborted; nothing is left to wait for.
    Aborted,
}

/// Why a command was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    Stopping,
    /// A reload of another kind is queued.
    OtherReloadQueued,
    NoReloadToAbort,
    /// A number is outside of its limits; the text says which.
    Limit(String),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Self::Stopping => "reuse-run is stopping",
            Self::OtherReloadQueued => "a reload of another kind is queued already (see reload --abort)",
            Self::NoReloadToAbort => "there is no reload to abort",
            Self::Limit(limit) => limit,
        })
    }
}

/// What to do, in the order of a list of actions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Start a worker; [`Event::Started`] or [`Event::StartFailed`] answers.
    Start {
        worker: WorkerId,
        slot: SlotId,
        generation: u32,
        /// Whether it shares its queues with the others for which that holds. None of them gets connections yet.
        shares_queue: bool,
    },
    /// Have a worker, which starts next, accept what waits for one that hangs.
    LetInherit {
        heir: WorkerId,
        of: WorkerId,
    },
    /// Have the kernel send new connections where this plan says; [`Event::SteerFailed`] answers if it doesn't.
    Steer(Plan),
    /// As [`Action::Steer`], at once for all addresses or not at all; [`Event::Switched`] answers.
    Switch(Plan),
    /// Send a request to a worker; [`Event::Probed`] answers.
    Probe {
        worker: WorkerId,
        endpoint: Endpoint,
    },
    /// A new generation begins. It runs this command, or that of the other generation.
    BeginGeneration {
        generation: u32,
        command: Option<CommandId>,
        like: u32,
    },
    /// Watch a retired worker's connections to these addresses until [`Event::Drained`].
    Drain {
        worker: WorkerId,
        addresses: BTreeSet<Address>,
    },
    /// Send it the stop signal.
    Signal {
        worker: WorkerId,
    },
    /// Its main process hasn't ended, and may keep the stop signal to itself: send it to those that serve behind it.
    SignalBehind {
        worker: WorkerId,
    },
    /// Send SIGKILL to it and to what it has started.
    Kill {
        worker: WorkerId,
    },
    /// Take back the sockets of a worker that has ended, and keep them for its successor if there will be one.
    Release {
        worker: WorkerId,
        successor: bool,
    },
    /// The successor for this slot and generation takes long: reset the connections that wait for it.
    ResetQueue {
        slot: SlotId,
        generation: u32,
    },
    /// No successor will come for this slot and generation: give up what was kept for it.
    Unreserve {
        slot: SlotId,
        generation: u32,
    },
    /// It was not ready in time: log a hint if there is one.
    Explain {
        worker: WorkerId,
    },
    /// Find the listeners of other programs on our addresses.
    FindForeignListeners,
    Log {
        level: log::Level,
        line: String,
    },
    /// Tell the service manager.
    Announce(Announcement),
    /// The operation with this ticket has ended. On success the text says which workers serve, else also why it
    /// failed.
    Ended {
        ticket: Ticket,
        outcome: Result<String, String>,
        /// The worker that made it fail.
        culprit: Option<WorkerId>,
    },
    /// All workers have ended.
    Exit {
        status: u8,
    },
}

/// The state of the service as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Announcement {
    Reloading,
    Ready {
        status: String,
    },
    /// It ends within this time.
    Stopping {
        within: Duration,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_has_the_status_and_the_words_that_a_shell_has() {
        let cases = [
            (End::Exited(3), 3, "exited with status 3"),
            (End::Killed(9), 137, "was killed by SIGKILL"),
            (End::Killed(34), 162, "was killed by signal 34"),
        ];
        for (end, status, words) in cases {
            assert_eq!((end.status(), end.to_string().as_str()), (status, words));
        }
    }

    #[test]
    fn a_refusal_says_why() {
        assert_eq!(Refusal::Stopping.to_string(), "reuse-run is stopping");
        assert_eq!(Refusal::Limit("too many".to_owned()).to_string(), "too many");
        assert!(Refusal::OtherReloadQueued.to_string().contains("queued"));
        assert!(Refusal::NoReloadToAbort.to_string().contains("no reload"));
    }
}
