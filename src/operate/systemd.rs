//! Notifications to systemd, or to another service manager that speaks sd_notify(3).
//!
//! With `Type=notify-reload` systemd reloads by SIGHUP and waits until reuse-run notifies it that the reload is over
//! (systemd.service(5)).

use std::env;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use log::debug;
use sd_notify::NotifyState;

use crate::words::escaped;

use crate::fleet::Announcement;

/// What systemd waits beyond the time that a stop takes: to reap killed workers takes a moment.
const STOP_MARGIN: Duration = Duration::from_secs(5);

/// Notifies systemd where NOTIFY_SOCKET is set, and its watchdog where WATCHDOG_USEC is set. Otherwise does nothing.
#[derive(Debug)]
pub struct Systemd {
    /// The time between two notifications, and the time of the next one.
    watchdog: Option<(Duration, Instant)>,
}

impl Systemd {
    pub fn new(now: Instant) -> Self {
        // Half of the time after which systemd would kill this process, as sd_watchdog_enabled(3) recommends.
        Self { watchdog: sd_notify::watchdog_enabled().map(|period| (period / 2, now)) }
    }

    pub fn announce(&self, announcement: &Announcement) {
        match announcement {
            Announcement::Ready { status } => {
                notify(&[NotifyState::Ready, NotifyState::Status(&escaped(status))]);
            }
            Announcement::Stopping { within } => {
                let longest = (*within + STOP_MARGIN).as_micros().try_into().unwrap_or(u32::MAX);
                let extend = NotifyState::ExtendTimeoutUsec(longest);
                notify(&[NotifyState::Stopping, extend, NotifyState::Status("stopping")]);
            }
            Announcement::Reloading => match NotifyState::monotonic_usec_now() {
                Ok(now) => notify(&[NotifyState::Reloading, now, NotifyState::Status("reloading")]),
                Err(error) => debug!("can't read the clock to notify systemd of the reload: {error}"),
            },
        }
    }

    /// When to call [`Systemd::ping_watchdog`] at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.watchdog.map(|(_, next)| next)
    }

    /// Notifies the watchdog that the poll loop runs, if that is due.
    pub fn ping_watchdog(&mut self, now: Instant) {
        if let Some((period, next)) = &mut self.watchdog
            && *next <= now
        {
            *next = now + *period;
            notify(&[NotifyState::Watchdog]);
        }
    }
}

/// Never blocks: a systemd that doesn't read must not delay the workers.
fn notify(states: &[NotifyState]) {
    let Some(name) = env::var_os("NOTIFY_SOCKET") else { return };
    let text: String = states.iter().map(|state| format!("{state}\n")).collect();
    let send = || -> io::Result<()> {
        let address = match name.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            _ => SocketAddr::from_pathname(&name)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        socket.send_to_addr(text.as_bytes(), &address).map(drop)
    };
    if let Err(error) = send() {
        debug!("can't notify systemd: {error}");
    }
}
