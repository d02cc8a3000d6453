//! What workers say: reads it, and what follows from it.

use log::{debug, warn};

use super::{Process, Source, Supervisor, watch};
use crate::fleet::Event;
use crate::ids::WorkerId;
use crate::kernel::inbox::{self, Inbox};
use crate::words::printable;
use crate::worker::ready::{Message, NodeChannel, ReadyPipe};

impl Process {
    /// What these messages come by; a pipe is no inbox.
    fn inbox(&self, source: Source) -> Option<&Inbox> {
        match source {
            Source::Node(_) => self.node.as_ref().map(AsRef::as_ref),
            Source::Notify(_) => Some(self.notify.as_ref()),
            _ => None,
        }
    }

    fn waits(&self, source: Source) -> bool {
        self.inbox(source).is_some_and(Inbox::waits)
    }
}

impl Supervisor {
    /// A worker has written to one of its ways to say something.
    pub(super) fn read_messages(&mut self, id: WorkerId, source: Source) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        let waited = process.waits(source);
        let messages = match source {
            Source::Pipe(_) => process.pipe.as_ref().map(ReadyPipe::read),
            Source::Node(_) => process.node.as_mut().map(NodeChannel::read),
            _ => Some(process.notify.read(process.pid)),
        };
        if let Some(inbox) = process.inbox(source).filter(|inbox| inbox.waits() != waited) {
            let changed = match waited {
                true => watch(&self.epoll, inbox, source),
                false => self.epoll.delete(inbox).map_err(Into::into),
            };
            changed.unwrap_or_else(|error| warn!("can't watch it: {error}"));
        }
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
                Message::Closed => self.close(id, source),
            }
        }
    }

    /// The worker has closed its end.
    fn close(&mut self, id: WorkerId, source: Source) {
        let Some(process) = self.processes.get_mut(&id) else { return };
        match source {
            Source::Pipe(_) => process.pipe = None,
            _ => {
                if let Some(node) = process.node.take() {
                    let _ = self.epoll.delete(node.as_ref()); // a child may have it open still
                }
            }
        }
    }

    /// Goes on with what has waited for a child of an inbox, after SIGCHLD.
    pub(super) fn read_what_waits(&mut self) {
        inbox::children_have_changed();
        if let Some(control) = self.control.as_ref().filter(|_| !inbox::is_full()) {
            let _ = watch(&self.epoll, control, Source::Control); // it is watched already, as a rule
        }
        let sources = |(id, process): (&WorkerId, &Process)| {
            let waiting =
                [Source::Node(*id), Source::Notify(*id)].map(|it| process.waits(it).then_some((*id, it)));
            waiting.into_iter().flatten()
        };
        let waiting: Vec<_> = self.processes.iter().flat_map(sources).collect();
        waiting.into_iter().for_each(|(id, source)| self.read_messages(id, source));
    }

    /// Takes out of epoll what a worker says, before it is closed: a child may have it open still.
    pub(super) fn forget_messages(&self, process: &Process) {
        let inboxes = process.node.iter().map(AsRef::as_ref).chain([process.notify.as_ref()]);
        for inbox in inboxes {
            let _ = self.epoll.delete(inbox);
        }
    }
}
