//! `--label`: the output of workers line by line. No part of it is lost, even if its reader is slow.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::load::{Load, LoadOptions};
use common::{
    DEADLINE, Folder, Outcome, Service, free_address, get, naive, redirected, reuse_run_with, run, send,
    server, ticks, wait_until, wake_ups,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

/// Workers that become ready by a byte on READY_FD.
fn start(options: &str, command: &[&str]) -> Service {
    Service::run_ready(&format!("--label --ready notify {options}"), command)
}

/// The path of a named pipe, and its read end, which is non-blocking at first.
fn named_pipe(folder: &Folder) -> (String, File) {
    let path = folder.path("pipe");
    nix::unistd::mkfifo(path.as_str(), nix::sys::stat::Mode::S_IRWXU).expect("make a pipe");
    let reader =
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).expect("open the pipe");
    (path, reader)
}

/// Waits for the first bytes, then makes reads blocking. (Before there is a writer, they return an end of file.)
fn begin_to_read(reader: &File) {
    let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(DEADLINE).expect("a timeout");
    assert_eq!(poll(&mut fds, timeout), Ok(1), "no writer");
    nix::fcntl::fcntl(reader, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty())).expect("fcntl");
}

/// Parses a labelled line: slot, pid and text.
fn parse(line: &str) -> Option<(u32, u32, &str)> {
    let (label, text) = line.split_once(' ')?;
    let (slot, pid) = label.split_once('|')?;
    Some((slot.parse().ok()?, pid.parse().ok()?, text))
}

/// The texts of each worker by pid, in order. Every line must have a label.
#[track_caller]
fn by_pid<'a>(lines: impl IntoIterator<Item = &'a str>) -> BTreeMap<u32, Vec<&'a str>> {
    let mut texts: BTreeMap<u32, Vec<&str>> = BTreeMap::new();
    for line in lines {
        let (_, pid, text) = parse(line).unwrap_or_else(|| panic!("no label: {line:?}"));
        texts.entry(pid).or_default().push(text);
    }
    texts
}

/// A worker that prints 10,000 numbered lines on each stream, in pieces of random length, and then ends: in even slots by
/// itself, in odd ones by SIGKILL. Its replacement prints nothing.
const PRINTER: &str = r#"
import os, random, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_DFL)
folder, slot = sys.argv[1], os.environ['REUSE_RUN_SLOT']
os.write(int(os.environ['READY_FD']), b'\n')
if os.path.exists(folder + 'printed-' + slot):
    open(folder + 'lives-' + slot, 'w')
    time.sleep(1000)
while not os.path.exists(folder + 'go'):
    time.sleep(0.01)
text = {fd: b''.join(b'%s %d %s\n' % (name, n, b'x' * (n % 150)) for n in range(10000)) for fd, name in ((1, b'out'), (2, b'err'))}
while text[1] or text[2]:
    fd = random.choice([fd for fd in text if text[fd]])
    written = os.write(fd, text[fd][:random.randint(1, 5000)])
    text[fd] = text[fd][written:]
open(folder + 'printed-' + slot, 'w')
if int(slot) % 2:
    os.kill(os.getpid(), signal.SIGKILL)
"#;

/// What a printer prints on a stream.
fn printed(name: &str) -> Vec<String> {
    (0..10_000).map(|n| format!("{name} {n} {}", "x".repeat(n % 150))).collect()
}

// Lines are whole, and none is lost.

#[test]
fn no_line_of_four_workers_that_print_and_die_is_lost_or_mixed() {
    let folder = Folder::new();
    folder.raise("go");
    let mut service = start("-n 4", &["python3", "-c", PRINTER, &folder.path("")]);
    let lives = |slot| Path::new(&folder.path(&format!("lives-{slot}"))).exists();
    wait_until("four replacements", DEADLINE, || (0..4).all(lives));
    service.stop();
    let (out, log) = (service.out.all(), service.log.all());
    let texts = by_pid(out.iter().map(|line| line.text.as_str()));
    assert_eq!(texts.len(), 4);
    texts.values().for_each(|texts| assert!(*texts == printed("out")));
    let labelled = log.iter().map(|line| line.text.as_str()).filter(|line| !line.starts_with("reuse-run["));
    let texts = by_pid(labelled);
    assert_eq!(texts.len(), 4);
    texts.values().for_each(|texts| assert!(*texts == printed("err")));
}

#[test]
fn the_last_output_of_a_worker_even_half_a_line_comes_before_the_log_line_about_its_death() {
    let folder = Folder::new();
    // As much as a pipe holds, so that one read doesn't get it all.
    let text = r#"echo >&$READY_FD; [ ! -e "$0died" ] || exec sleep 1000
        while [ ! -e "$0die" ]; do sleep 0.02; done
        : >"$0died"; printf half
        yes 0123456789abcde | head -c 65525 >&2; printf 'half a line' >&2; kill -KILL $$"#;
    let mut service = start("-n 1", &["sh", "-c", text, &folder.path("")]);
    service.signal(Signal::SIGSTOP);
    folder.raise("die");
    wait_until("the worker has died", DEADLINE, || !service.zombies().is_empty());
    service.signal(Signal::SIGCONT);
    service.wait_for_line("is ready, a replacement");
    service.stop();
    let log: Vec<String> = service.log.all().into_iter().map(|line| line.text).collect();
    let last = log.iter().position(|line| line.ends_with("half a line")).expect("the line");
    let (slot, pid, _) = parse(&log[last]).expect("a label");
    let died = log.iter().position(|line| line.contains("was killed by SIGKILL")).expect("the death");
    assert!(last < died, "{:#?}", &log[last.min(died)..]);
    assert!(log[died].contains(&format!("worker {slot} (pid {pid}, ")), "{:?}", log[died]);
    assert_eq!(service.out.text(), format!("0|{pid} half"));
}

#[test]
fn output_during_the_stop_is_not_lost() {
    let text = "import os, signal, sys, time
def stop(*_):
    sys.stdout.write(''.join(f'line {n}\\n' for n in range(50000)) + 'the last')
    sys.stdout.flush()
    os._exit(0)
signal.signal(signal.SIGINT, stop)
os.write(int(os.environ['READY_FD']), b'\\n')
while True: time.sleep(0.1)";
    let mut service = start("-n 2", &["python3", "-c", text]);
    service.stop();
    let out = service.out.all();
    let mut expected: Vec<String> = (0..50_000).map(|n| format!("line {n}")).collect();
    expected.push("the last".to_owned());
    let texts = by_pid(out.iter().map(|line| line.text.as_str()));
    assert_eq!(texts.len(), 2);
    texts.values().for_each(|texts| assert!(*texts == expected));
}

#[test]
fn output_of_a_child_that_outlives_its_worker_has_the_workers_label() {
    let folder = Folder::new();
    let text = r#"setsid sh -c ': >"$0child"; while [ ! -e "$0speak" ]; do sleep 0.02; done; echo the child' "$0" &
        while [ ! -e "$0child" ]; do sleep 0.02; done
        echo >&$READY_FD; exec sleep 1000"#;
    let mut service = start("-n 1", &["sh", "-c", text, &folder.path("")]);
    let worker = service.workers()[0];
    send(worker, Signal::SIGKILL);
    service.wait_for_line("was killed by SIGKILL");
    wait_until("the replacement", DEADLINE, || service.log.find(0, "is ready, a replacement").is_some());
    folder.raise("speak");
    service.wait_for_output(&format!("0|{worker} the child"));
    wait_until("the child has ended", DEADLINE, || service.descendants().len() == 1);
    service.stop();
}

#[test]
fn a_line_of_a_mebibyte_of_any_bytes_arrives_unchanged() {
    let folder = Folder::new();
    let text = "import os, time
os.write(2, b'ignored\\n')
data = bytes(b if b != 10 else 0 for b in ((n * 7 + (n >> 8)) & 255 for n in range(1 << 20)))
while data: data = data[os.write(1, data[:10007]):]
os.write(int(os.environ['READY_FD']), b'\\n')
time.sleep(1000)";
    let path = folder.path("out");
    let command = ["python3", "-c", text];
    let mut service =
        Service::spawn_ready(redirected(&format!(">{path}"), "--label -n 1 --ready notify", &command));
    let label = format!("0|{} ", service.workers()[0]);
    service.stop();
    let bytes = fs::read(path).expect("the output");
    let mut content = Vec::new();
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        let line = line.strip_prefix(label.as_bytes()).expect("a label");
        content.extend_from_slice(line.strip_suffix(b"\n").expect("a newline"));
    }
    let expected = (0..1usize << 20).map(|n| (n * 7 + (n >> 8)) as u8);
    let expected: Vec<u8> = expected.map(|byte| if byte == b'\n' { 0 } else { byte }).collect();
    assert!(content == expected, "{} bytes", content.len());
}

#[test]
fn log_lines_never_come_in_the_middle_of_a_workers_line() {
    let folder = Folder::new();
    let (path, reader) = named_pipe(&folder);
    let line = format!("begin {} end", "x".repeat(20_000));
    let text = format!(
        "import os, signal, time
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.write(int(os.environ['READY_FD']), b'\\n')
while True:
    for fd in 1, 2: os.write(fd, b'{line}\\n')
    time.sleep(0.001)"
    );
    let mut command = redirected(
        &format!(">{path} 2>&1"),
        "--label -n 2 --ready notify --drain 100ms",
        &["python3", "-c", &text],
    );
    command.env("REUSE_RUN_LOG", "debug");
    let mut service = Service::spawn(command);
    // No line fits into so small a pipe.
    nix::fcntl::fcntl(&reader, nix::fcntl::FcntlArg::F_SETPIPE_SZ(4096)).expect("F_SETPIPE_SZ");
    begin_to_read(&reader);
    let (log_line, mut reloads, mut labelled) = (format!("reuse-run[{}]: ", service.pid()), 0, 0);
    for read in BufReader::new(reader).lines() {
        let read = read.expect("a line of text");
        if let Some(rest) = read.strip_prefix(&log_line) {
            assert!(!rest.contains("begin ") && !rest.contains("xxx"), "{rest:?}");
            if rest.contains("generation 1 is ready") || rest.contains("reload done") {
                reloads += 1;
                service.signal(if reloads > 5 { Signal::SIGTERM } else { Signal::SIGUSR2 });
            }
        } else {
            let (_, _, text) = parse(&read).unwrap_or_else(|| panic!("no label: {read:?}"));
            // The last line of a worker that is stopped may be incomplete.
            assert!(text == line || line.starts_with(text), "{text:?}");
            labelled += usize::from(text == line);
        }
    }
    assert_eq!(service.wait_end().code(), Some(0));
    assert!(reloads == 6 && labelled > 100, "{reloads} reloads, {labelled} lines");
}

#[test]
fn a_failed_reload_shows_the_last_lines_of_the_worker_that_failed() {
    let text = r#"[ $REUSE_RUN_GENERATION = 1 ] && exec sleep 1000
        for word in one two three four five six seven; do echo "$word" >&2; done; printf 'no newline' >&2; exit 3"#;
    let mut service = Service::run_ready("-n 1 --label --ready 1s", &["sh", "-c", text]);
    let Outcome { code, err, .. } = run(&service, "reload");
    assert_eq!(code, Some(1), "{err}");
    let expected = ["  four", "  five", "  six", "  seven", "  no newline"];
    assert_eq!(err.lines().filter(|line| line.starts_with("  ")).collect::<Vec<_>>(), expected, "{err}");
    service.stop();
}

// Readers that are slow, or have closed.

/// The test server. In slot 0 another process floods stdout.
const FLOODING_SERVER: &str = r#"[ $REUSE_RUN_SLOT != 0 ] || yes "a line of the flood" &
    exec "$0" --listen "$1" >/dev/null"#;

#[test]
fn while_a_flood_is_not_read_workers_serve_and_a_reload_loses_no_request() {
    let (addr, folder) = (free_address(), Folder::new());
    let (path, mut reader) = named_pipe(&folder);
    let command = ["sh", "-c", FLOODING_SERVER, &server(), &addr.to_string()];
    let mut service = Service::spawn_ready(redirected(&format!(">{path}"), "--label -n 2", &command));
    let load = Load::start(LoadOptions::new(addr, 4));
    for _ in 0..3 {
        service.reload();
    }
    load.stop().assert_nothing_failed();
    // reuse-run only waits for the reader.
    let before = ticks(service.pid());
    let quiet = Instant::now();
    wait_until("one second", DEADLINE, || quiet.elapsed() > Duration::from_secs(1));
    let used = ticks(service.pid()) - before;
    assert!(used < 20, "{used} hundredths of a second");
    assert!(service.memory_kib() < 16 * 1024, "{} KiB", service.memory_kib());
    service.signal(Signal::SIGTERM);
    assert_eq!(service.wait_exit().code(), Some(0), "{}", service.log.text());
    let mut text = String::new();
    let _ = reader.read_to_string(&mut text);
    let whole = text.lines().filter_map(parse).filter(|(.., text)| *text == "a line of the flood").count();
    // At the stop, output that doesn't fit into the pipe is dropped, so the last line may be incomplete.
    assert!(whole > 1000 && whole + 1 >= text.lines().count(), "{whole} of {}", text.lines().count());
}

#[test]
fn a_slow_reader_also_gets_lines_of_a_worker_that_writes_little() {
    let folder = Folder::new();
    let (path, reader) = named_pipe(&folder);
    let text = r#"echo >&$READY_FD
        [ $REUSE_RUN_SLOT = 3 ] || exec yes "a line of the flood"
        while :; do echo little; sleep 0.05; done"#;
    let mut service = Service::spawn_ready(redirected(
        &format!(">{path}"),
        "--label -n 4 --ready notify",
        &["sh", "-c", text],
    ));
    begin_to_read(&reader);
    let stop = AtomicBool::new(false);
    let (lines, little) = thread::scope(|scope| {
        // About 1 MB a second.
        let slow = scope.spawn(|| {
            let (mut lines, mut little) = (0, 0);
            for line in BufReader::with_capacity(4096, &reader).lines() {
                let line = line.expect("a line");
                let (slot, _, text) = parse(&line).unwrap_or_else(|| panic!("no label: {line:?}"));
                // The last line of a worker that is stopped may be incomplete.
                let whole = if slot == 3 { "little" } else { "a line of the flood" };
                assert!(whole.starts_with(text), "{line:?}");
                lines += 1;
                little += usize::from(slot == 3);
                if lines % 128 == 0 && !stop.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_millis(4)); // the slow reader
                }
                if little == 20 && !stop.swap(true, Ordering::Relaxed) {
                    service.signal(Signal::SIGTERM);
                }
            }
            (lines, little)
        });
        slow.join().expect("the reader")
    });
    assert!(
        lines > 1000 && little >= 20,
        "{lines} lines, {little} of them from the worker that writes little"
    );
    assert_eq!(service.wait_end().code(), Some(0));
}

#[test]
fn a_worker_lives_on_when_its_output_cannot_be_read_any_more() {
    for redirection in [">PIPE", ">&-", ">/dev/null", ">/dev/full"] {
        let folder = Folder::new();
        let (path, reader) = named_pipe(&folder);
        let text = r#"echo >&$READY_FD; while [ ! -e "$0go" ]; do sleep 0.02; done
            yes | head -c 1000000; : >"$0done"; exec sleep 1000"#;
        let command = ["sh", "-c", text, &folder.path("")];
        let redirection = redirection.replace("PIPE", &path);
        let options = "--label -n 1 --ready notify";
        let mut service = Service::spawn_ready(redirected(&redirection, options, &command));
        let workers = service.workers();
        drop(reader);
        folder.raise("go");
        let done = folder.path("done");
        wait_until("it has printed everything", DEADLINE, || Path::new(&done).exists());
        assert_eq!(service.workers(), workers, "{redirection}: {}", service.log.text());
        service.stop();
    }
}

#[test]
fn reuse_run_does_not_wait_for_a_socket_that_it_writes_to_and_nothing_is_lost() {
    let (ours, its) = UnixStream::pair().expect("a pair of sockets");
    let folder = Folder::new();
    let options = "--label -n 4 --ready notify";
    let mut command = reuse_run_with(options, &["python3", "-c", PRINTER, &folder.path("")]);
    let (out, err) = (its.try_clone().expect("a duplicate"), its);
    let mut child =
        command.stdout(OwnedFd::from(out)).stderr(OwnedFd::from(err)).spawn().expect("start reuse-run");
    drop(command); // with its copies of the socket
    let mut lines = BufReader::new(ours).lines().map(|line| line.expect("a line"));
    // Only then is each next worker called a replacement.
    lines.find(|line| line.contains("generation 1 is ready")).expect("the workers are ready");
    folder.raise("go");
    // Until the test reads, there is no room in the socket.
    let wait = Instant::now();
    wait_until("a full socket", DEADLINE, || wait.elapsed() > Duration::from_millis(300));
    let (mut counts, mut lives) = (BTreeMap::<u32, usize>::new(), 0);
    for line in lines {
        if let Some((_, pid, text)) = parse(&line) {
            let number = text.split(' ').nth(1).and_then(|n| n.parse::<usize>().ok()).expect("a number");
            assert_eq!(text.len(), format!("out {number} ").len() + number % 150, "{line:?}");
            *counts.entry(pid).or_default() += 1;
        } else {
            assert!(line.starts_with("reuse-run["), "{line:?}");
            lives += usize::from(line.contains("is ready, a replacement"));
            if lives == 4 {
                send(child.id(), Signal::SIGTERM);
                lives += 1;
            }
        }
    }
    assert!(child.wait().expect("wait").success());
    assert_eq!(counts.into_values().collect::<Vec<_>>(), [20_000; 4]);
}

#[test]
fn in_one_file_both_streams_and_the_log_are_whole_lines() {
    let folder = Folder::new();
    folder.raise("go");
    let path = folder.path("out");
    let command = ["python3", "-c", PRINTER, &folder.path("")];
    let mut service =
        Service::spawn(redirected(&format!(">{path} 2>&1"), "--label -n 4 --ready notify", &command));
    let lives = |slot| Path::new(&folder.path(&format!("lives-{slot}"))).exists();
    wait_until("four replacements", DEADLINE, || (0..4).all(lives));
    service.stop();
    let text = fs::read_to_string(path).expect("the output");
    let texts = by_pid(text.lines().filter(|line| !line.starts_with("reuse-run[")));
    assert_eq!(texts.len(), 4);
    for texts in texts.values() {
        for name in ["out", "err"] {
            let of_stream: Vec<&str> = texts.iter().filter(|text| text.starts_with(name)).copied().collect();
            assert!(of_stream == printed(name), "{name}");
        }
    }
    assert_eq!(text.lines().filter(|line| line.contains("stopping")).count(), 1);
}

// What it costs.

#[test]
fn without_label_a_worker_has_the_same_stdout_and_stderr_as_reuse_run() {
    let addr = free_address();
    let links = |pid: u32| [1, 2].map(|fd| fs::read_link(format!("/proc/{pid}/fd/{fd}")).expect("a link"));
    for (options, same) in [("-n 2", true), ("--label -n 2", false)] {
        let mut service = Service::run_ready(options, &naive(addr));
        for worker in service.workers() {
            for (its, ours) in links(worker).into_iter().zip(links(service.pid())) {
                assert_eq!(its == ours, same, "{options}: {its:?} and {ours:?}");
            }
        }
        service.stop();
    }
}

#[test]
fn after_200_reloads_no_more_fds_are_open_than_after_2_and_reuse_run_is_idle() {
    let addr = free_address();
    let mut service = Service::run_ready("--label -n 1", &naive(addr));
    let mut after_2 = 0;
    for reload in 1..=200 {
        service.reload();
        if reload == 2 {
            after_2 = service.fds();
        }
    }
    assert_eq!(service.fds(), after_2);
    assert_eq!(get(addr).generation, Some(201));
    // It may have something left to do, but not for long.
    let (mut seen, mut since) = (wake_ups(service.pid()), Instant::now());
    wait_until("two seconds without a wake-up", DEADLINE, || {
        let now = wake_ups(service.pid());
        if now != seen {
            (seen, since) = (now, Instant::now());
        }
        since.elapsed() > Duration::from_secs(2)
    });
    service.stop();
    assert_eq!(service.out.count_of("listening pid="), 201);
}
