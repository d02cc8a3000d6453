//! The HTTP server of the tests: std only, a thread for each connection, and no signal handler unless an option asks for it.
//!
//! It answers `pid=… generation=… slot=… port=… work=…`. `/sleep/MS` takes that many milliseconds. For a request with
//! `?id=X` it prints `begun X` when it has read the request and `done X` when it has written the answer. With `--share` it
//! sets SO_REUSEPORT, with `--udp` it also answers datagrams, with `--given` it also serves the listeners of LISTEN_FDS, and with `--announce` it prints
//! `accepted pid=…` and `closed pid=…` for each connection.
#![cfg_attr(clippy, deny(warnings))]
#![allow(unsafe_code)]

use std::env;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::path::PathBuf;
use std::process::exit;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use signal_hook::consts::SIGINT;
use signal_hook::iterator::Signals;
use signal_hook::low_level::emulate_default_handler;
use socket2::{Domain, Socket, Type};

const USAGE: &str = "usage: server [--listen HOST:PORT]... [--udp HOST:PORT] [--share] [--non-blocking] [--given] [--listen-after MS] [--ready-after MS] \
    [--exit-after MS] [--exit-status N] [--shutdown-on-int] [--ignore-int] [--exit-on-int] [--die-of-int MS] \
    [--hang] \
    [--keep-alive] [--announce] [--deaf-while FILE]";

#[derive(Default)]
struct Options {
    listen: Vec<String>,
    udp: Option<String>,
    share: bool,
    non_blocking: bool,
    given: bool,
    listen_after: Duration,
    ready_after: Option<Duration>,
    exit_after: Option<Duration>,
    exit_status: i32,
    shutdown_on_int: bool,
    ignore_int: bool,
    exit_on_int: bool,
    die_of_int: Option<Duration>,
    hang: bool,
    keep_alive: bool,
    announce: bool,
    deaf_while: Option<PathBuf>,
}

fn parse() -> Options {
    let mut options = Options::default();
    let mut args = env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().unwrap_or_else(|| wrong(&format!("{arg} needs a value")));
        match arg.as_str() {
            "--listen" => options.listen.push(value()),
            "--udp" => options.udp = Some(value()),
            "--share" => options.share = true,
            "--non-blocking" => options.non_blocking = true,
            "--given" => options.given = true,
            "--listen-after" => options.listen_after = milliseconds(&value()),
            "--ready-after" => options.ready_after = Some(milliseconds(&value())),
            "--exit-after" => options.exit_after = Some(milliseconds(&value())),
            "--exit-status" => {
                options.exit_status = value().parse().unwrap_or_else(|_| wrong("--exit-status"));
            }
            "--shutdown-on-int" => options.shutdown_on_int = true,
            "--ignore-int" => options.ignore_int = true,
            "--exit-on-int" => options.exit_on_int = true,
            "--die-of-int" => options.die_of_int = Some(milliseconds(&value())),
            "--hang" => options.hang = true,
            "--keep-alive" => options.keep_alive = true,
            "--announce" => options.announce = true,
            "--deaf-while" => options.deaf_while = Some(value().into()),
            _ => wrong(&format!("unknown argument {arg}")),
        }
    }
    options
}

fn wrong(what: &str) -> ! {
    eprintln!("server: {what}\n{USAGE}");
    exit(64)
}

fn milliseconds(text: &str) -> Duration {
    Duration::from_millis(
        text.parse().unwrap_or_else(|_| wrong(&format!("not a number of milliseconds: {text}"))),
    )
}

/// What all connections share.
struct Server {
    keep_alive: bool,
    announce: bool,
    /// Nothing is accepted while this file exists.
    deaf_while: Option<PathBuf>,
    generation: String,
    slot: String,
    /// Connections that are accepted and not answered yet; with keep-alive, requests that have begun and aren't answered
    /// yet.
    in_progress: AtomicUsize,
}

fn main() {
    let options = parse();
    let server = Arc::new(Server {
        keep_alive: options.keep_alive,
        announce: options.announce,
        deaf_while: options.deaf_while,
        generation: env::var("REUSE_RUN_GENERATION").unwrap_or_default(),
        slot: env::var("REUSE_RUN_SLOT").unwrap_or_default(),
        in_progress: AtomicUsize::new(0),
    });

    if options.ignore_int {
        let mut signals = Signals::new([SIGINT]).expect("catch SIGINT");
        thread::spawn(move || signals.forever().for_each(|_| say("ignored SIGINT")));
    }
    if options.exit_on_int {
        let mut signals = Signals::new([SIGINT]).expect("catch SIGINT");
        thread::spawn(move || {
            signals.forever().next();
            exit(0)
        });
    }
    if let Some(after) = options.die_of_int {
        let mut signals = Signals::new([SIGINT]).expect("catch SIGINT");
        thread::spawn(move || {
            signals.forever().next();
            thread::sleep(after);
            emulate_default_handler(SIGINT)
        });
    }
    if let Some(after) = options.exit_after {
        let status = options.exit_status;
        thread::spawn(move || {
            thread::sleep(after);
            exit(status)
        });
    }

    thread::sleep(options.listen_after);
    if let Some(addr) = &options.udp {
        let socket = bind_datagrams(addr, options.share);
        let socket = socket.unwrap_or_else(|error| wrong(&format!("bind {addr}: {error}")));
        let server = Arc::clone(&server);
        thread::spawn(move || answer_datagrams(&server, &socket));
    }
    let mut listeners = Vec::new();
    if !options.hang {
        for addr in &options.listen {
            let (share, non_blocking) = (options.share, options.non_blocking);
            match if share || non_blocking {
                bind_with(addr, share, non_blocking)
            } else {
                TcpListener::bind(addr)
            } {
                Ok(listener) => listeners.push(listener),
                Err(error) => {
                    eprintln!("server: bind {addr}: {error}");
                    exit(error.raw_os_error().unwrap_or(1))
                }
            }
        }
        if options.given {
            let count: i32 = env::var("LISTEN_FDS").expect("LISTEN_FDS").parse().expect("a number");
            // SAFETY: these fds were passed to this process, and nothing else here uses them.
            listeners.extend((3..3 + count).map(|fd| unsafe { TcpListener::from_raw_fd(fd) }));
        }
        say(&format!(
            "listening pid={} generation={} slot={}",
            std::process::id(),
            server.generation,
            server.slot
        ));
    }

    // Begins before the first accept, so that the order of the printed lines shows what came first.
    if let Some(after) = options.ready_after {
        thread::spawn(move || {
            thread::sleep(after);
            say("ready");
            let number = env::var("READY_FD").expect("READY_FD").parse().expect("READY_FD is a number");
            // SAFETY: this fd was passed to this process, and nothing else here uses it.
            let mut pipe = unsafe { File::from_raw_fd(number) };
            pipe.write_all(b"\n").expect("write to READY_FD");
        });
    }

    let mut own = Vec::new();
    let mut accepting = Vec::new();
    for listener in listeners {
        own.push(listener.try_clone().expect("duplicate a listener"));
        let server = Arc::clone(&server);
        accepting.push(thread::spawn(move || accept(&server, &listener)));
    }
    if options.shutdown_on_int {
        let mut signals = Signals::new([SIGINT]).expect("catch SIGINT");
        signals.forever().next();
        for listener in &own {
            let _ = nix::sys::socket::shutdown(listener.as_raw_fd(), nix::sys::socket::Shutdown::Read);
        }
        // When these threads have ended, every accepted connection is counted.
        accepting.into_iter().for_each(|thread| thread.join().expect("accept"));
        while server.in_progress.load(Ordering::SeqCst) > 0 {
            thread::sleep(Duration::from_millis(5));
        }
        exit(0)
    }
    loop {
        thread::park();
    }
}

/// Answers with who it is, and with what came.
fn answer_datagrams(server: &Server, socket: &UdpSocket) {
    let who = format!("pid={} generation={} slot={} ", std::process::id(), server.generation, server.slot);
    let mut text = [0; 2048];
    loop {
        if let Ok((len, client)) = socket.recv_from(&mut text) {
            let _ = socket.send_to(&[who.as_bytes(), &text[..len]].concat(), client);
        }
    }
}

/// As `UdpSocket::bind`, and with SO_REUSEPORT.
fn bind_datagrams(addr: &str, share: bool) -> io::Result<UdpSocket> {
    if !share {
        return UdpSocket::bind(addr);
    }
    let addr: SocketAddr = addr.parse().unwrap_or_else(|_| wrong("--share needs an address in numbers"));
    let socket = Socket::new(Domain::for_address(addr), Type::DGRAM, None)?;
    socket.set_reuse_port(true)?;
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

/// As `TcpListener::bind`, and with SO_REUSEPORT or O_NONBLOCK.
fn bind_with(addr: &str, share: bool, non_blocking: bool) -> io::Result<TcpListener> {
    let addr: SocketAddr =
        addr.parse().unwrap_or_else(|_| wrong("--share and --non-blocking need an address in numbers"));
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(share)?;
    socket.set_nonblocking(non_blocking)?;
    socket.bind(&addr.into())?;
    socket.listen(128)?;
    Ok(socket.into())
}

fn wait_for_connection(listener: &TcpListener) {
    let mut readable = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    let _ = poll(&mut readable, PollTimeout::NONE);
}

fn accept(server: &Arc<Server>, listener: &TcpListener) {
    let port = listener.local_addr().map_or(0, |addr| addr.port());
    while server.deaf_while.as_ref().is_some_and(|file| file.exists()) {
        thread::sleep(Duration::from_millis(10));
    }
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                if server.announce {
                    say(&format!("accepted pid={}", std::process::id()));
                }
                let server = Arc::clone(server);
                if !server.keep_alive {
                    server.in_progress.fetch_add(1, Ordering::SeqCst);
                }
                thread::spawn(move || {
                    let _ = serve(&server, stream, port);
                    if server.announce {
                        say(&format!("closed pid={}", std::process::id()));
                    }
                    if !server.keep_alive {
                        server.in_progress.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => wait_for_connection(listener),
            // The listener was shut down. Requests in progress continue.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return,
            Err(error) => eprintln!("server: accept: {error}"),
        }
    }
}

/// Serves a connection, and closes it before `in_progress` is lowered.
fn serve(server: &Server, mut stream: TcpStream, port: u16) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut bytes = Vec::new();
    loop {
        let Some((target, close)) = read_head(&mut stream, &mut bytes)? else { return Ok(()) };
        if !server.keep_alive {
            return answer(server, &mut stream, port, &target, true);
        }
        server.in_progress.fetch_add(1, Ordering::SeqCst);
        let answered = answer(server, &mut stream, port, &target, close);
        server.in_progress.fetch_sub(1, Ordering::SeqCst);
        answered?;
        if close {
            return Ok(());
        }
    }
}

/// Reads the head of a request. Returns its target, and whether it is the last on the connection; `None` at the end of the
/// connection.
fn read_head(stream: &mut TcpStream, bytes: &mut Vec<u8>) -> io::Result<Option<(String, bool)>> {
    let mut chunk = [0; 4096];
    loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            let head: Vec<u8> = bytes.drain(..end + 4).collect();
            let head = String::from_utf8_lossy(&head).into_owned();
            let close = head.contains("\r\nConnection: close\r\n");
            return Ok(Some((head.split(' ').nth(1).unwrap_or("/").to_owned(), close)));
        }
        match stream.read(&mut chunk)? {
            0 => return Ok(None),
            count => bytes.extend_from_slice(&chunk[..count]),
        }
    }
}

fn answer(server: &Server, stream: &mut TcpStream, port: u16, target: &str, close: bool) -> io::Result<()> {
    let begun = Instant::now();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let id = query.split('&').find_map(|pair| pair.strip_prefix("id="));
    if let Some(id) = id {
        say(&format!("begun {id}"));
    }
    if let Some(text) = path.strip_prefix("/sleep/") {
        thread::sleep(milliseconds(text).saturating_sub(begun.elapsed()));
    }
    let body = format!(
        "pid={} generation={} slot={} port={port} work={}\n",
        std::process::id(),
        server.generation,
        server.slot,
        id.unwrap_or("-"),
    );
    let connection = if close { "close" } else { "keep-alive" };
    let response = format!(
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\nConnection: {connection}\r\n\r\n{body}",
        body.len(),
    );
    stream.write_all(response.as_bytes())?;
    if let Some(id) = id {
        say(&format!("done {id}"));
    }
    Ok(())
}

/// Prints a line in one write(2), so that a killed server leaves no half line.
fn say(line: &str) {
    let mut out = io::stdout().lock();
    let _ = out.write_all(format!("{line}\n").as_bytes());
    let _ = out.flush();
}
