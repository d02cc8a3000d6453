//! What workers say: that they are ready, their status, that they stop.

use log::debug;

use super::{Source, Supervisor};
use crate::fleet::Event;
use crate::ids::WorkerId;
use crate::words::printable;
use crate::worker::ready::{Message, NodeChannel, ReadyPipe};

impl Supervisor {
    /// A worker has written to one of its ways to say something.
    pub(super) fn read_messages(&mut self, id: WorkerId, source: Source) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        let messages = match source {
            Source::Pipe(_) => process.pipe.as_ref().map(ReadyPipe::read),
            Source::Node(_) => process.node.as_mut().map(NodeChannel::read),
            _ => Some(process.notify.read(process.pid)),
        };
        let pid = process.pid;
        for message in messages.unwrap_or_default() {
            match message {
                // The pipe stays open: a worker that says it twice must not get SIGPIPE.
                Message::Ready => self.handle(Event::SaysReady { worker: id }),
                Message::Status(text) => {
                    let text = printable(text.as_bytes());
                    debug!("worker (pid {pid}) says: {text}");
                    if let Some(process) = self.processes.get_mut(&id) {
                        process.status = Some(text);
                    }
                }
                Message::Stopping => debug!("worker (pid {pid}) says that it stops"),
                Message::Closed => {
                    let Some(process) = self.processes.get_mut(&id) else { return };
                    match source {
                        Source::Pipe(_) => process.pipe = None,
                        _ => process.node = None,
                    }
                }
            }
        }
    }
}
