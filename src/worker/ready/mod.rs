//! The ways in which a worker says that it is ready: a byte on a pipe, a message on Node's IPC channel, or a
//! message to a socket as for systemd. Reading them never blocks.

mod folder;
mod node;
mod notify;
mod pipe;

pub use folder::Folder;
pub use node::NodeChannel;
pub use notify::NotifySocket;
pub use pipe::ReadyPipe;

/// What a worker says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    Ready,
    /// Its state in its own words.
    Status(String),
    /// It is about to end.
    Stopping,
    /// It has closed the channel.
    Closed,
}

/// How many bytes are read from a worker in one turn, so that a flood from one doesn't hold up others.
const MAX_BYTES_PER_TURN: usize = 64 * 1024;
