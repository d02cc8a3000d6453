//! Clients: one request, and what a load has to show.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use socket2::{Domain, Socket, Type};

use super::load::{self, Load, LoadOptions, Report};
use super::service::Service;
use super::wait::{DEADLINE, wait_until};

/// Who answers a request on a new connection. The request must succeed.
#[track_caller]
pub fn get(addr: SocketAddr) -> load::Origin {
    get_path(addr, "/").origin
}

/// The answer to a request on a new connection. The request must succeed.
#[track_caller]
pub fn get_path(addr: SocketAddr, path: &str) -> load::Answer {
    load::get(addr, path, Duration::from_secs(15))
        .unwrap_or_else(|failure| panic!("GET {path} from {addr}: {failure:?}"))
}

/// Waits for the answer to a request that begins from now on: one answer more than there are clients.
#[track_caller]
pub fn answered_more(load: &Load) {
    wait_for_answers(load, load.clients() as u64);
}

/// Waits until the load has got more than `more` further answers.
#[track_caller]
pub fn wait_for_answers(load: &Load, more: u64) {
    let answered = load.snapshot().answered;
    wait_until("answers", DEADLINE, || load.snapshot().answered > answered + more);
}

/// Reloads `times` times under load and asserts that no request fails. Returns the load's report.
#[track_caller]
pub fn reload_under_load(service: &Service, options: LoadOptions, times: u32) -> Report {
    reload_under_loads(service, [options], times).remove(0)
}

/// The same for several loads at once.
#[track_caller]
pub fn reload_under_loads(
    service: &Service,
    options: impl IntoIterator<Item = LoadOptions>,
    times: u32,
) -> Vec<Report> {
    let loads: Vec<Load> = options.into_iter().map(Load::start).collect();
    loads.iter().for_each(answered_more);
    for _ in 0..times {
        service.reload();
        loads.iter().for_each(answered_more);
    }
    let reports: Vec<Report> = loads.into_iter().map(Load::stop).collect();
    for report in &reports {
        println!("{report}");
        report.assert_nothing_failed();
    }
    reports
}

/// A client that has sent its request and waits for the answer.
pub struct Waiting(TcpStream);

impl Waiting {
    /// Connects, for which a listener with room in its accept queue is enough, and sends a request.
    #[track_caller]
    pub fn new(addr: SocketAddr) -> Waiting {
        Waiting::on(TcpStream::connect(addr).expect("connect"))
    }

    /// From an address of this machine, or of a route to it.
    #[track_caller]
    pub fn from(client: IpAddr, addr: SocketAddr) -> Waiting {
        let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None).expect("a socket");
        if client.is_ipv6() {
            socket.set_freebind_v6(true).expect("set IPV6_FREEBIND");
        }
        socket.bind(&SocketAddr::new(client, 0).into()).expect("bind");
        socket.connect(&addr.into()).expect("connect");
        Waiting::on(socket.into())
    }

    #[track_caller]
    fn on(mut stream: TcpStream) -> Waiting {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").expect("ask");
        stream.set_nonblocking(true).expect("set non-blocking");
        Waiting(stream)
    }

    /// Whether neither an answer nor the end of the connection has come.
    pub fn waits(&self) -> bool {
        matches!(self.0.peek(&mut [0]), Err(error) if error.kind() == ErrorKind::WouldBlock)
    }

    /// Waits for the answer or the end of the connection.
    pub fn outcome(mut self) -> std::io::Result<load::Origin> {
        let mut text = String::new();
        self.0.set_nonblocking(false)?;
        self.0.set_read_timeout(Some(DEADLINE))?;
        self.0.read_to_string(&mut text)?;
        if text.is_empty() { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(load::Origin::of(&text)) }
    }

    /// Waits for the reset of the connection.
    #[track_caller]
    pub fn assert_reset(self) {
        match self.outcome() {
            Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
            other => panic!("not reset but {other:?}"),
        }
    }
}
