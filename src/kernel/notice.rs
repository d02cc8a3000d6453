//! Reports that a file was readable, even if only for a moment.
#![allow(unsafe_code)]

use std::io;
use std::mem::zeroed;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use libc::{c_int, c_long};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::kernel::sys::check;

/// Tells that a file was readable for a moment. epoll tells only what is still so when it is asked: a connection that a worker
/// takes at once, it doesn't report. A poll by io_submit(2) ends at the moment of the event and has no second look.
#[derive(Debug)]
pub struct Notice {
    context: libc::c_ulong,
    eventfd: EventFd,
    is_given: bool,
}

impl Notice {
    /// # Errors
    /// Those of eventfd(2) and io_setup(2): ENOSYS if the kernel was built without it, EAGAIN if fs.aio-max-nr is used up.
    pub fn new() -> io::Result<Self> {
        let eventfd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { context: io_setup()?, eventfd, is_given: true })
    }

    /// Makes [`Notice::as_fd`] readable, once, as soon as `file` is.
    ///
    /// # Errors
    /// Those of io_submit(2).
    pub fn await_once(&mut self, file: BorrowedFd) -> io::Result<()> {
        if self.is_given {
            io_submit_poll(self.context, file, self.eventfd.as_fd())?;
            self.is_given = false;
        }
        Ok(())
    }

    /// Call it when [`Notice::as_fd`] is readable. The next [`Notice::await_once`] waits again.
    pub fn take(&mut self) {
        let _ = self.eventfd.read();
        let _ = io_drop_event(self.context);
        self.is_given = true;
    }
}

impl AsFd for Notice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}

/// io_setup(2): a context for one operation at a time.
fn io_setup() -> io::Result<libc::c_ulong> {
    let mut context: libc::c_ulong = 0;
    // SAFETY: the kernel writes the context's number there.
    check(unsafe { libc::syscall(libc::SYS_io_setup, 1 as c_long, &raw mut context) } as c_int)?;
    Ok(context)
}

/// io_submit(2), IOCB_CMD_POLL: `eventfd` becomes readable as soon as `fd` is, and stays so.
fn io_submit_poll(context: libc::c_ulong, fd: BorrowedFd, eventfd: BorrowedFd) -> io::Result<()> {
    const IOCB_CMD_POLL: u16 = 5; // linux/aio_abi.h
    const IOCB_FLAG_RESFD: u32 = 1;
    // SAFETY: all its fields are numbers, for which zero is a value.
    let mut operation: libc::iocb = unsafe { zeroed() };
    operation.aio_lio_opcode = IOCB_CMD_POLL;
    operation.aio_fildes = fd.as_raw_fd() as u32;
    operation.aio_buf = libc::POLLIN as u64;
    operation.aio_flags = IOCB_FLAG_RESFD;
    operation.aio_resfd = eventfd.as_raw_fd() as u32;
    let operations = [&raw const operation];
    // SAFETY: the kernel copies the one operation that the list has. It keeps references to both files by itself.
    check(unsafe { libc::syscall(libc::SYS_io_submit, context, 1 as c_long, operations.as_ptr()) } as c_int)?;
    Ok(())
}

/// io_getevents(2): drops the result of an operation that has ended, without waiting for one.
fn io_drop_event(context: libc::c_ulong) -> io::Result<()> {
    let (mut event, now) = ([0u64; 4], libc::timespec { tv_sec: 0, tv_nsec: 0 }); // struct io_event is of this size
    // SAFETY: the kernel writes at most one event, for which there is room, and reads the time.
    let result = unsafe {
        libc::syscall(
            libc::SYS_io_getevents,
            context,
            0 as c_long,
            1 as c_long,
            event.as_mut_ptr(),
            &raw const now,
        )
    };
    check(result as c_int)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
    use nix::unistd::{pipe, read, write};

    use super::*;

    #[test]
    fn what_was_readable_for_a_moment_is_known_afterwards_once_for_each_time_that_it_is_awaited() {
        let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
        let (reader, writer) = pipe().unwrap();
        epoll.add(&reader, EpollEvent::new(EpollFlags::EPOLLIN, 0)).unwrap();
        let mut notice = Notice::new().unwrap();
        let is_readable =
            |fd: BorrowedFd| poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::ZERO).unwrap() > 0;
        for _ in 0..1000 {
            notice.await_once(epoll.0.as_fd()).unwrap();
            assert!(!is_readable(notice.as_fd()));
            for _ in 0..2 {
                write(&writer, &[0]).unwrap();
                read(&reader, &mut [0]).unwrap();
            }
            assert!(!is_readable(epoll.0.as_fd()), "it is over");
            assert!(is_readable(notice.as_fd()));
            notice.take();
            assert!(!is_readable(notice.as_fd()));
        }
    }
}
