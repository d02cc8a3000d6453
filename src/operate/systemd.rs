//! What the service manager is told, if there is one that wants to know: sd_notify(3).
//!
//! With `Type=notify-reload` systemd reloads by SIGHUP and waits for the announcement that it is over
//! (systemd.service(5)).

use std::env;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use log::debug;
use sd_notify::NotifyState;

use crate::fleet::Announcement;

/// The manager's end of the conversation, by NOTIFY_SOCKET and WATCHDOG_USEC.
#[derive(Debug)]
pub struct Manager {
    /// How often it wants to hear that the loop goes round, and when it will next.
    watchdog: Option<(Duration, Instant)>,
}

impl Manager {
    pub fn new(now: Instant) -> Self {
        // Half of the time after which it would give up on us (sd_watchdog_enabled(3)).
        Self { watchdog: sd_notify::watchdog_enabled().map(|period| (period / 2, now)) }
    }

    /// Says how the service stands. Without a manager nothing happens.
    pub fn announce(&self, announcement: &Announcement) {
        match announcement {
            Announcement::Ready { status } => say(&[NotifyState::Ready, NotifyState::Status(status)]),
            Announcement::Stopping => say(&[NotifyState::Stopping, NotifyState::Status("stopping")]),
            Announcement::Reloading => match NotifyState::monotonic_usec_now() {
                Ok(now) => say(&[NotifyState::Reloading, now, NotifyState::Status("reloading")]),
                Err(error) => debug!("no clock to tell the service manager by: {error}"),
            },
        }
    }

    /// When to call [`Manager::is_alive`] at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.watchdog.map(|(_, next)| next)
    }

    /// Tells a watchdog that the loop goes round, if it is time to.
    pub fn is_alive(&mut self, now: Instant) {
        if let Some((period, next)) = &mut self.watchdog
            && *next <= now
        {
            *next = now + *period;
            say(&[NotifyState::Watchdog]);
        }
    }
}

/// Tells the manager, if it is there to hear it. Never blocks: a manager that doesn't read is not to hold up
/// the workers.
fn say(states: &[NotifyState]) {
    let Some(name) = env::var_os("NOTIFY_SOCKET") else { return };
    let text: String = states.iter().map(|state| format!("{state}\n")).collect();
    let said = || -> io::Result<()> {
        let address = match name.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(&name)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        socket.send_to_addr(text.as_bytes(), &address).map(drop)
    };
    if let Err(error) = said() {
        debug!("can't tell the service manager: {error}");
    }
}
