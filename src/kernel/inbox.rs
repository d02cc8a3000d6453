//! Unix sockets that others write to. A message may come with descriptors (SCM_RIGHTS, unix(7)), and the process that
//! takes it from the queue closes those that nobody else has, also if it didn't ask for them. That may take for ever, as for a socket
//! that lingers, a file of FUSE, or a socket whose own queue holds one of these. So the wrapper looks before it takes
//! (MSG_PEEK), and leaves the closing to children, which may be lost.

use std::cell::RefCell;
use std::io::{self, ErrorKind};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::signal::{Signal, kill, raise};
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, Shutdown, UnixCredentials, recvmsg, setsockopt, shutdown,
    sockopt::OobInline, sockopt::PassCred,
};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::{Pid, pause};

use crate::kernel::helper;
use crate::kernel::sys::{self, Received};

/// How many children may live, those that hold descriptors for an [`Inbox`] included.
const MAX_CHILDREN: usize = 64;
/// With so many, no child begins that only closes: other users can cause those.
const MAX_CLOSING: usize = 16;
/// The descriptors that one message can carry (SCM_MAX_FD).
const MAX_DESCRIPTORS: usize = 253;

/// The children, and the sockets that wait for one.
#[derive(Debug, Default)]
struct Children {
    living: Vec<Pid>,
    doomed: Vec<OwnedFd>,
}

thread_local! {
    static CHILDREN: RefCell<Children> = RefCell::default();
}

impl Children {
    /// Forks a child. Returns `None` in the child.
    fn fork(&mut self, limit: usize) -> io::Result<Option<Pid>> {
        self.living.retain(|pid| helper::is_helper(*pid));
        if self.living.len() >= limit {
            return Err(ErrorKind::QuotaExceeded.into());
        }
        let child = helper::fork(c"reuse-run-close");
        self.living.extend(child.as_ref().ok().copied().flatten());
        child
    }

    /// Has a child close what waits, if it may begin now.
    fn close_doomed(&mut self, limit: usize) {
        if self.doomed.is_empty() {
            return;
        }
        match self.fork(limit) {
            Ok(Some(child)) => {
                // The child has them too. So this isn't their last close; the end of the child is.
                self.doomed.clear();
                let _ = kill(child, Signal::SIGKILL);
            }
            Ok(None) => loop {
                pause();
            },
            Err(_) => {} // see `children_have_changed`
        }
    }
}

/// Closes a socket whose queue may hold descriptors.
pub fn close_elsewhere(socket: OwnedFd) {
    CHILDREN.with_borrow_mut(|children| {
        children.doomed.push(socket);
        children.close_doomed(MAX_CLOSING);
    });
}

/// Whether sockets that wait to be closed take a quarter of the descriptors that this process may have.
pub fn is_full() -> bool {
    let doomed = CHILDREN.with_borrow(|children| children.doomed.len());
    doomed > 0 && getrlimit(Resource::RLIMIT_NOFILE).is_ok_and(|(most, _)| doomed as u64 >= most / 4)
}

/// Call it after SIGCHLD. The owner of an [`Inbox`] that waits has to try again then too.
pub fn children_have_changed() {
    CHILDREN.with_borrow_mut(|children| children.close_doomed(MAX_CLOSING));
}

/// Call it at the end of this process, which would close them itself otherwise.
pub fn leave() {
    CHILDREN.with_borrow_mut(|children| children.close_doomed(usize::MAX));
}

/// A Unix socket that others write to, for reading.
#[derive(Debug)]
pub struct Inbox {
    socket: ManuallyDrop<OwnedFd>,
    is_datagram: bool,
    /// The last child that has had the descriptors of a message.
    holder: Option<Pid>,
    waits: bool,
}

impl Inbox {
    /// A connection.
    pub fn stream(socket: OwnedFd) -> Self {
        // Otherwise the next read closes what came with a byte out of band.
        let _ = setsockopt(&socket, OobInline, &true);
        Self { socket: ManuallyDrop::new(socket), is_datagram: false, holder: None, waits: false }
    }

    /// A socket of datagrams, each of which tells its sender. It must be non-blocking.
    pub fn datagrams(socket: OwnedFd) -> io::Result<Self> {
        setsockopt(&socket, PassCred, &true)?;
        Ok(Self { socket: ManuallyDrop::new(socket), is_datagram: true, holder: None, waits: false })
    }

    fn recvmsg(&self, bytes: &mut [u8], flags: libc::c_int) -> io::Result<Received> {
        sys::recvmsg(self.socket.as_fd(), bytes, flags, self.is_datagram)
    }

    /// Receives what comes without descriptors.
    ///
    /// # Errors
    /// InvalidData if descriptors come with it; it stays in the queue then.
    pub fn receive(&self, bytes: &mut [u8]) -> io::Result<Received> {
        let next = self.recvmsg(bytes, libc::MSG_PEEK)?;
        match next.length {
            _ if next.has_descriptors => Err(ErrorKind::InvalidData.into()),
            0 if !self.is_datagram => Ok(next), // the end
            // Nothing that has come since.
            length => self.recvmsg(&mut bytes[..length], 0),
        }
    }

    /// Receives what comes, without the descriptors. If there are some, a child has to have them before: then this is
    /// WouldBlock, and the inbox [waits](Inbox::waits).
    pub fn receive_all(&mut self, bytes: &mut [u8]) -> io::Result<Received> {
        self.holder = self.holder.filter(|pid| helper::is_helper(*pid));
        if let Some(holder) = self.holder.filter(|_| self.waits) {
            let stopped = waitid(Id::Pid(holder), WaitPidFlag::WSTOPPED | WaitPidFlag::WNOHANG);
            if !matches!(stopped, Ok(WaitStatus::Stopped(..))) {
                return Err(ErrorKind::WouldBlock.into());
            }
            self.waits = false;
            let received = self.recvmsg(bytes, 0);
            let _ = kill(holder, Signal::SIGKILL);
            return received;
        }
        match self.receive(bytes) {
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                self.waits = true;
                if self.holder.is_none() {
                    self.holder = self.hold(bytes.len()).ok();
                }
                Err(ErrorKind::WouldBlock.into())
            }
            received => {
                self.waits = false;
                received
            }
        }
    }

    /// Whether the next message waits for a child: that it has the descriptors, or that the last one has ended. Until
    /// then the socket must not be watched.
    pub fn waits(&self) -> bool {
        self.waits
    }

    /// Forks a child that takes the descriptors of the next message into its own table, and stops. They stay in the queue
    /// too, so that to take the message from there closes nothing.
    fn hold(&self, length: usize) -> io::Result<Pid> {
        if let Some(holder) = CHILDREN.with_borrow_mut(|children| children.fork(MAX_CHILDREN))? {
            return Ok(holder);
        }
        sys::close_all_but(&[self.socket.as_raw_fd()]);
        let mut bytes = vec![0; length];
        let mut space = nix::cmsg_space!(UnixCredentials, [RawFd; MAX_DESCRIPTORS]);
        let mut buffers = [io::IoSliceMut::new(&mut bytes)];
        let peeked =
            recvmsg::<()>(self.socket.as_raw_fd(), &mut buffers, Some(&mut space), MsgFlags::MSG_PEEK);
        if !peeked.is_ok_and(|message| !message.flags.contains(MsgFlags::MSG_CTRUNC)) {
            // It may not have so many (RLIMIT_NOFILE): the message is lost, and closed here.
            let _ = self.recvmsg(&mut vec![0; length], 0);
            sys::exit_now();
        }
        loop {
            let _ = raise(Signal::SIGSTOP);
        }
    }

    /// Duplicates of the descriptors that come with the next message, which stays in the queue.
    /// To close one of them may take for ever, unless it is known what it is.
    ///
    /// # Errors
    /// Those of recvmsg(2). InvalidData if there are more than two, some of which stay open.
    pub fn peek_descriptors(&self) -> io::Result<Vec<OwnedFd>> {
        let mut space = nix::cmsg_space!(UnixCredentials, RawFd); // and is rounded up
        let mut byte = [0];
        let mut buffers = [io::IoSliceMut::new(&mut byte)];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_CMSG_CLOEXEC;
        let peeked = recvmsg::<()>(self.socket.as_raw_fd(), &mut buffers, Some(&mut space), flags)?;
        // It is an error of nix's if there are more.
        let messages = peeked.cmsgs().map_err(|_| ErrorKind::InvalidData)?;
        let rights = messages.flat_map(|message| match message {
            ControlMessageOwned::ScmRights(fds) => fds,
            _ => Vec::new(),
        });
        Ok(rights.map(sys::owned_fd).collect())
    }

    /// Takes a message whose descriptors this process has too, so that this isn't their last close.
    pub fn discard_peeked(&self) {
        let _ = self.recvmsg(&mut [0], 0);
    }

    /// Lets nobody send any more, and discards what has come. Returns whether the queue is empty now; otherwise it holds
    /// descriptors.
    pub fn seal(&self) -> bool {
        let mut bytes = [0; 4096];
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Read);
        loop {
            match self.receive(&mut bytes) {
                Ok(received) if received.length == 0 && !self.is_datagram => return true,
                Ok(_) => {}
                Err(error) => return error.kind() != ErrorKind::InvalidData,
            }
        }
    }
}

impl AsFd for Inbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        let is_empty = !self.waits && self.seal();
        let socket = sys::take_in_drop(&mut self.socket);
        if !is_empty {
            close_elsewhere(socket);
        }
        if let Some(holder) = self.holder.filter(|pid| self.waits && helper::is_helper(*pid)) {
            let _ = kill(holder, Signal::SIGKILL);
        }
    }
}
