//! What reuse-run tells systemd: readiness, reloads, the stop, the watchdog.

use std::cell::RefCell;
use std::fs;
use std::io::IoSliceMut;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::cmsg_space;
use nix::sys::signal::Signal;
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg, setsockopt, sockopt::PassCred,
};
use nix::time::{ClockId, clock_gettime};

use crate::common::{
    DEADLINE, Folder, Service, arguments, free_address, get, naive, own_network, reuse_run, wait_until,
};

/// The end of NOTIFY_SOCKET that belongs to a service manager such as systemd.
struct Manager {
    socket: UnixDatagram,
    /// What has been received so far.
    received: RefCell<Vec<Message>>,
}

#[derive(Clone, Debug)]
struct Message {
    text: String,
    pid: u32,
    at: Instant,
}

impl Message {
    fn says(&self, line: &str) -> bool {
        self.text.lines().any(|text| text == line)
    }

    fn value(&self, name: &str) -> Option<&str> {
        self.text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
    }
}

impl Manager {
    fn at(folder: &Folder) -> Manager {
        Manager::new(UnixDatagram::bind(folder.path("notify")).expect("bind"))
    }

    fn new(socket: UnixDatagram) -> Manager {
        socket.set_nonblocking(true).expect("set non-blocking");
        setsockopt(&socket, PassCred, &true).expect("SO_PASSCRED");
        Manager { socket, received: RefCell::default() }
    }

    /// All messages so far.
    fn messages(&self) -> Vec<Message> {
        let mut bytes = [0; 4096];
        let mut space = cmsg_space!(UnixCredentials);
        loop {
            let mut buffers = [IoSliceMut::new(&mut bytes)];
            let fd = self.socket.as_raw_fd();
            let Ok(message) = recvmsg::<()>(fd, &mut buffers, Some(&mut space), MsgFlags::empty()) else {
                return self.received.borrow().clone();
            };
            let pid = message.cmsgs().expect("control messages").find_map(|control| match control {
                ControlMessageOwned::ScmCredentials(credentials) => Some(credentials.pid() as u32),
                _ => None,
            });
            let (pid, length) = (pid.expect("credentials"), message.bytes);
            let text = String::from_utf8_lossy(&bytes[..length]).into_owned();
            self.received.borrow_mut().push(Message { text, pid, at: Instant::now() });
        }
    }

    /// Waits for message number `index`, which must contain this line.
    #[track_caller]
    fn wait_for(&self, index: usize, line: &str) -> Message {
        wait_until(line, DEADLINE, || self.messages().len() > index);
        let message = self.messages()[index].clone();
        assert!(message.says(line), "not {line:?} but {:?}", self.messages());
        message
    }
}

/// reuse-run as a manager starts it, with the default disposition of SIGHUP.
fn managed(socket: &str, more: &[(&str, &str)], arguments: &[String]) -> Service {
    let mut command = Command::new("env");
    command.arg("--default-signal=HUP").arg(reuse_run().get_program()).args(arguments);
    command.env_remove("REUSE_RUN_LOG").env("NOTIFY_SOCKET", socket).envs(more.iter().copied());
    Service::spawn(command)
}

fn monotonic_usec() -> i64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("a clock");
    now.tv_sec() * 1_000_000 + now.tv_nsec() / 1000
}

#[test]
fn systemd_is_told_about_readiness_reloads_and_the_stop_when_they_happen() {
    let (addr, folder, sockets) = (free_address(), Folder::new(), Folder::new());
    let manager = Manager::at(&sockets);
    folder.raise("hold-1-1");
    let options = arguments("-n 2", &folder.server(addr, &[]));
    let mut service = managed(&sockets.path("notify"), &[], &options);
    let pid = service.pid();

    // Worker 0 is ready and answers; worker 1 isn't.
    wait_until("the first worker", DEADLINE, || TcpStream::connect(addr).is_ok());
    assert_eq!(get(addr).slot, Some(0));
    assert_eq!(manager.messages().len(), 0, "{:?}", manager.messages());
    folder.lower("hold-1-1");
    let ready = manager.wait_for(0, "READY=1");
    assert_eq!(ready.value("STATUS"), Some("2 workers of generation 1 serve"));

    // A reload by SIGHUP that is held up half-way.
    folder.raise("hold-2-1");
    let (from, before) = (service.log.count(), monotonic_usec());
    service.signal(Signal::SIGHUP);
    let reloading = manager.wait_for(1, "RELOADING=1");
    let stamp: i64 = reloading.value("MONOTONIC_USEC").expect("a time").parse().expect("a number");
    assert!((before..=monotonic_usec()).contains(&stamp), "{stamp}");
    assert!(reloading.value("STATUS").is_some(), "{reloading:?}");
    assert!(!reloading.says("READY=1"), "{reloading:?}");
    wait_until("worker 0 of generation 2", DEADLINE, || service.workers().len() == 4);
    assert_eq!(manager.messages().len(), 2, "{:?}", manager.messages());
    folder.lower("hold-2-1");
    service.wait_for_line_after(from, "reload done");
    let ready = manager.wait_for(2, "READY=1");
    assert_eq!(ready.value("STATUS"), Some("2 workers of generation 2 serve"));

    // A reload that is abandoned.
    folder.raise("broken-3-0");
    let from = service.log.count();
    service.signal(Signal::SIGHUP);
    manager.wait_for(3, "RELOADING=1");
    service.wait_for_line_after(from, "reload abandoned");
    let ready = manager.wait_for(4, "READY=1");
    assert_eq!(ready.value("STATUS"), Some("2 workers of generation 2 serve"));
    assert_eq!(get(addr).generation, Some(2));

    service.stop();
    let stopping = manager.wait_for(5, "STOPPING=1");
    assert!(stopping.value("STATUS").is_some(), "{stopping:?}");
    let messages = manager.messages();
    assert_eq!(messages.len(), 6, "{messages:?}");
    for message in messages {
        assert_eq!(message.pid, pid, "{message:?}");
        assert_eq!(message.value("MAINPID"), None, "the main process never changes");
        assert_eq!(message.value("WATCHDOG"), None, "there is no watchdog");
    }
}

#[test]
fn a_manager_with_an_abstract_socket_is_also_told() {
    own_network(); // it has abstract names of its own
    let name = "reuse-run-test-manager";
    let address = UnixAddr::from_abstract_name(name).expect("a name");
    let manager = Manager::new(UnixDatagram::bind_addr(&address).expect("bind"));
    let addr = free_address();
    let mut service = managed(&format!("@{name}"), &[], &arguments("-n 1", &naive(addr)));
    manager.wait_for(0, "READY=1");
    service.stop();
    manager.wait_for(1, "STOPPING=1");
}

#[test]
fn a_watchdog_gets_two_messages_in_its_period_even_during_a_reload() {
    let (addr, folder, sockets) = (free_address(), Folder::new(), Folder::new());
    let manager = Manager::at(&sockets);
    let period = Duration::from_secs(2);
    let options = arguments("-n 2", &folder.server(addr, &[]));
    let mut service = managed(&sockets.path("notify"), &[("WATCHDOG_USEC", "2000000")], &options);
    let beats = || {
        let messages = manager.messages().into_iter().filter(|message| message.says("WATCHDOG=1"));
        messages.map(|message| message.at).collect::<Vec<_>>()
    };
    // Nothing happens during the first three; during the others a reload is held up.
    wait_until("3 beats", DEADLINE, || beats().len() >= 3);
    folder.raise("hold-2-0");
    service.signal(Signal::SIGHUP);
    wait_until("5 beats", DEADLINE, || beats().len() >= 5);
    let beats = beats();
    for pair in beats.windows(2) {
        assert!(pair[1] - pair[0] < period, "too late for a manager: {beats:?}");
    }
    let all = beats[4] - beats[0];
    assert!(all > 4 * period / 2 - Duration::from_millis(500), "too often: {beats:?}");
    folder.lower("hold-2-0");
    service.wait_for_line("reload done");
    service.stop();
}

#[test]
fn a_watchdog_of_another_process_gets_no_message() {
    let (addr, sockets) = (free_address(), Folder::new());
    let manager = Manager::at(&sockets);
    let watchdog = [("WATCHDOG_USEC", "1000"), ("WATCHDOG_PID", "1")];
    let mut service = managed(&sockets.path("notify"), &watchdog, &arguments("-n 1", &naive(addr)));
    manager.wait_for(0, "READY=1");
    service.reload();
    manager.wait_for(2, "READY=1");
    service.stop();
    manager.wait_for(3, "STOPPING=1");
    assert_eq!(manager.messages().len(), 4, "{:?}", manager.messages());
}

#[test]
fn a_manager_that_has_ended_disturbs_nothing() {
    let (addr, sockets) = (free_address(), Folder::new());
    let manager = Manager::at(&sockets);
    let watchdog = [("WATCHDOG_USEC", "20000")];
    let mut service = managed(&sockets.path("notify"), &watchdog, &arguments("-n 2", &naive(addr)));
    service.wait_until_ready();
    drop(manager);
    service.reload();
    fs::remove_file(sockets.path("notify")).expect("remove the socket");
    service.reload();
    assert_eq!(get(addr).generation, Some(3));
    service.stop();
}

#[test]
fn a_manager_that_does_not_read_holds_up_nothing() {
    let (addr, sockets) = (free_address(), Folder::new());
    let manager = Manager::at(&sockets);
    let watchdog = [("WATCHDOG_USEC", "2000")];
    let mut service = managed(&sockets.path("notify"), &watchdog, &arguments("-n 1", &naive(addr)));
    // The queue is full (net.unix.max_dgram_qlen) when a message of this test doesn't fit either.
    let other = UnixDatagram::unbound().expect("a socket");
    other.set_nonblocking(true).expect("set non-blocking");
    wait_until("a full queue", DEADLINE, || other.send_to(b"", sockets.path("notify")).is_err());
    service.wait_until_ready();
    service.reload();
    assert_eq!(get(addr).generation, Some(2));
    service.stop();
    drop(manager);
}
