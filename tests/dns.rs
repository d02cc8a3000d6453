//! DNS servers that know nothing of reuse-run: no query is lost, over UDP and TCP.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use common::{DEADLINE, Folder, Service, free_address, needs_other_users, wait_until};

const RELOADS: usize = 20;
/// A query without an answer after this time is lost.
const LOST_AFTER: Duration = Duration::from_secs(20);
/// A question for the address of `name.test.` with this number (RFC 1035, 4.1), which the servers answer by themselves.
const QUESTION: &[u8] = b"\x01\x00\x00\x01\0\0\0\0\0\0\x04name\x04test\0\0\x01\0\x01";
const ADDRESS: [u8; 4] = [192, 0, 2, 1];

fn query(number: u16) -> Vec<u8> {
    [&number.to_be_bytes()[..], QUESTION].concat()
}

/// Whether this is the answer: of the same number, without an error, and with the address at its end.
fn is_answer(bytes: &[u8], number: u16) -> bool {
    bytes.starts_with(&number.to_be_bytes())
        && bytes.len() > 12
        && bytes[3] & 0x0f == 0
        && bytes[6..8] == [0, 1]
        && bytes.windows(ADDRESS.len()).any(|window| window == ADDRESS)
}

/// Asks over UDP by sockets of its own, 20 queries by each, one after the other.
fn ask_by_udp(server: SocketAddr, number: &mut u16, answers: &AtomicUsize) -> io::Result<()> {
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(LOST_AFTER))?;
    for _ in 0..20 {
        *number = number.wrapping_add(1);
        socket.send(&query(*number))?;
        let mut answer = [0; 512];
        let len = socket.recv(&mut answer)?;
        assert!(is_answer(&answer[..len], *number), "{:?}", &answer[..len]);
        answers.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Asks over TCP, one query by each connection.
fn ask_by_tcp(server: SocketAddr, number: &mut u16, answers: &AtomicUsize) -> io::Result<()> {
    *number = number.wrapping_add(1);
    let mut connection = TcpStream::connect(server)?;
    connection.set_read_timeout(Some(LOST_AFTER))?;
    let query = query(*number);
    connection.write_all(&[&(query.len() as u16).to_be_bytes()[..], &query].concat())?;
    let mut len = [0; 2];
    connection.read_exact(&mut len)?;
    let mut answer = vec![0; u16::from_be_bytes(len).into()];
    connection.read_exact(&mut answer)?;
    assert!(is_answer(&answer, *number), "{answer:?}");
    answers.fetch_add(1, Ordering::Relaxed);
    Ok(())
}

type Ask = fn(SocketAddr, &mut u16, &AtomicUsize) -> io::Result<()>;

/// Clients that ask all the time, and end at the first query that is lost.
struct Clients {
    end: Arc<AtomicBool>,
    answers: Arc<[AtomicUsize; 2]>,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

impl Clients {
    fn start(server: SocketAddr) -> Clients {
        let (end, answers) = (Arc::new(AtomicBool::new(false)), Arc::new([const { AtomicUsize::new(0) }; 2]));
        let start = |number: usize| {
            let (end, answers) = (Arc::clone(&end), Arc::clone(&answers));
            let ask: Ask = if number.is_multiple_of(2) { ask_by_udp } else { ask_by_tcp };
            thread::spawn(move || {
                let mut of_query = 1000 * number as u16;
                while !end.load(Ordering::Relaxed) {
                    ask(server, &mut of_query, &answers[number % 2])?;
                }
                Ok(())
            })
        };
        Clients { threads: (0..8).map(start).collect(), end, answers }
    }

    #[track_caller]
    fn wait_for_more(&self) {
        for answers in &*self.answers {
            let before = answers.load(Ordering::Relaxed);
            let failed = || self.threads.iter().any(JoinHandle::is_finished);
            wait_until("more answers", DEADLINE, || {
                failed() || answers.load(Ordering::Relaxed) > before + 100
            });
        }
    }

    #[track_caller]
    fn stop(self) {
        self.end.store(true, Ordering::Relaxed);
        for thread in self.threads {
            let lost = thread.join().expect("a client");
            assert!(lost.is_ok(), "{lost:?}, after {:?} answers", self.answers);
        }
    }
}

#[track_caller]
fn assert_nothing_is_lost(options: &str, address: SocketAddr, command: &[&str]) {
    let options = format!("-n 2 --udp --ready-timeout 60s --quiet-after 300ms {options}");
    let mut service = Service::run_ready(&options, command);
    let clients = Clients::start(address);
    for _ in 0..RELOADS {
        clients.wait_for_more();
        service.reload();
    }
    clients.wait_for_more();
    clients.stop();
    service.stop();
}

#[test]
fn dnsmasq_loses_no_query_in_twenty_reloads() {
    needs_other_users!();
    let (address, folder) = (free_address(), Folder::new());
    let path = folder.path("dnsmasq.conf");
    let config = format!(
        "keep-in-foreground\npid-file\nno-resolv\nno-hosts\nbind-interfaces\nlisten-address=127.0.0.1\nport={}\n\
         user=root\naddress=/test/192.0.2.1\n",
        address.port(),
    );
    std::fs::write(&path, config).expect("write its configuration");
    assert_nothing_is_lost("--stop-signal TERM", address, &["dnsmasq", "-C", &path]);
}

#[test]
fn unbound_loses_no_query_in_twenty_reloads() {
    let (address, folder) = (free_address(), Folder::new());
    let (port, path) = (address.port(), folder.path("unbound.conf"));
    let config = format!(
        "server:\n interface: 127.0.0.1\n port: {port}\n do-daemonize: no\n chroot: \"\"\n username: \"\"\n \
         pidfile: \"\"\n use-syslog: no\n local-zone: \"test.\" redirect\n local-data: \"test. A 192.0.2.1\"\n\
         remote-control:\n control-enable: no\n"
    );
    std::fs::write(&path, config).expect("write its configuration");
    assert_nothing_is_lost("", address, &["unbound", "-d", "-c", &path]);
}
