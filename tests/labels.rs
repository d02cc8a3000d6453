//! `--label`: the workers' output line by line, with slot and PID before each.

mod common;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::load::{Load, LoadOptions};
use common::{DEADLINE, Folder, Service, arguments, free_address, get, reuse_run, server, turn, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, pipe};

fn sh(text: &str) -> [&str; 3] {
    ["sh", "-c", text]
}

/// What is behind the label of each line, by slot and PID.
#[track_caller]
fn by_worker(lines: &[common::Line]) -> BTreeMap<(u32, u32), Vec<String>> {
    let mut found: BTreeMap<(u32, u32), Vec<String>> = BTreeMap::new();
    for line in lines.iter().filter(|line| !line.text.starts_with("reuse-run[")) {
        let parts = line.text.split_once(' ').and_then(|(label, text)| Some((label.split_once('|')?, text)));
        let Some(((slot, pid), text)) = parts else { panic!("no label: {:?}", line.text) };
        let number = |text: &str| text.parse::<u32>().unwrap_or_else(|_| panic!("no label: {:?}", line.text));
        found.entry((number(slot), number(pid))).or_default().push(text.to_owned());
    }
    found
}

#[test]
fn the_lines_of_four_workers_are_whole_and_in_order_and_none_is_missing() {
    let _turn = turn();
    let text = r#"i=0; while [ $i -lt 5000 ]; do echo "out $i"; echo "err $i" >&2; i=$((i+1)); done
        printf 'the end'; exec sleep 1000"#;
    let mut service = Service::run("-n 4 --label --ready 1ms --stop-signal KILL", &sh(text));
    wait_until("all that is whole", DEADLINE, || {
        service.out.count_of("out 4999") == 4 && service.log.count_of("err 4999") == 4
    });
    let workers = service.workers();
    service.signal(Signal::SIGTERM); // which kills them: the last line has no newline
    service.wait_end();
    for (lines, name) in [(service.out.all(), "out"), (service.log.all(), "err")] {
        let found = by_worker(&lines);
        let pids: Vec<u32> = found.keys().map(|(_, pid)| *pid).collect();
        assert_eq!(found.keys().map(|(slot, _)| *slot).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert!(pids.iter().all(|pid| workers.contains(pid)), "{pids:?} of {workers:?}");
        let mut expected: Vec<String> = (0..5000).map(|number| format!("{name} {number}")).collect();
        if name == "out" {
            expected.push("the end".to_owned());
        }
        for (worker, lines) in found {
            assert_eq!(lines.len(), expected.len(), "{worker:?}");
            assert_eq!(lines, expected, "{worker:?}");
        }
    }
}

#[test]
fn bytes_that_are_no_text_and_lines_of_a_megabyte_arrive_as_they_are() {
    let folder = Folder::new();
    let text = r#"printf '\377\001\n'; head -c 1048576 /dev/zero | tr '\0' x; echo; exec sleep 1000"#;
    let output = File::create(folder.path("out")).expect("make a file");
    let mut command = reuse_run();
    command.args(arguments("-n 1 --label --ready 1ms", &sh(text))).stdin(Stdio::null());
    command.stdout(output).stderr(Stdio::null());
    let mut child = Ended(command.spawn().expect("start reuse-run"));
    let read = || fs::read(folder.path("out")).expect("the output");
    // It comes in labelled lines of 64 KiB, the last one of which ends with the line.
    wait_until("all of it", DEADLINE, || read().iter().filter(|byte| **byte == b'x').count() == 1 << 20);
    wait_until("the line's end", DEADLINE, || read().ends_with(b"x\n"));
    let output = read();
    let lines: Vec<&[u8]> = output.split(|byte| *byte == b'\n').collect();
    assert!(lines[0].ends_with(b"\xff\x01"), "{:?}", lines[0]);
    assert_eq!(lines.len(), 1 + 16 + 1, "16 lines of 64 KiB, and nothing behind the last newline");
    child.end();
}

/// A process that is killed at the end, if it hasn't ended.
struct Ended(Child);

impl Ended {
    fn end(&mut self) {
        let _ = kill(Pid::from_raw(self.0.id() as i32), Signal::SIGTERM);
        self.0.wait().expect("wait for reuse-run");
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill(); // which kills its workers too
        let _ = self.0.wait();
    }
}

#[test]
fn what_a_child_prints_that_outlives_its_worker_is_labelled_too() {
    let folder = Folder::new();
    let text = format!(
        r#"setsid sh -c 'echo "a child"; while [ ! -e {0} ]; do sleep 0.02; done; echo "from the child"' & exec sleep 1000"#,
        folder.path("go")
    );
    let mut service = Service::run_ready("-n 1 --label --ready 1ms", &sh(&text));
    let worker = service.workers()[0];
    service.wait_for_output(&format!("0|{worker} a child")); // which is in a group of its own by now
    kill(Pid::from_raw(worker as i32), Signal::SIGKILL).expect("kill the worker");
    service.wait_for_line("is ready, a replacement");
    folder.raise("go");
    let line = service.wait_for_output(&format!("0|{worker} from the child"));
    assert_eq!(line.text, format!("0|{worker} from the child"));
    wait_until("the children have ended", DEADLINE, || service.descendants().len() == 1);
    service.stop();
}

#[test]
fn a_flood_that_nobody_reads_holds_up_neither_requests_nor_reloads_nor_signals() {
    let _turn = turn();
    let addr = free_address();
    let (unread, write) = pipe().expect("a pipe");
    let mut command = reuse_run();
    // The server itself would wait as well if it printed to what nobody reads.
    let text = r#"[ $REUSE_RUN_SLOT = 0 ] && yes $REUSE_RUN_GENERATION & exec "$0" --listen "$1" >/dev/null"#;
    let worker = ["sh", "-c", text, &server(), &addr.to_string()];
    command.args(arguments("-n 2 --label", &worker)).stdin(Stdio::null());
    let mut wrapper = Ended({
        command.stdout(write).stderr(Stdio::piped());
        let child = command.spawn().expect("start reuse-run");
        drop(command); // and its copy of the pipe's end
        child
    });
    let mut log = BufReader::new(wrapper.0.stderr.take().expect("stderr is a pipe"));
    let mut wait_for = |part: &str| {
        let mut line = String::new();
        while !line.contains(part) {
            line.clear();
            assert_ne!(log.read_line(&mut line).expect("read the log"), 0, "the end before {part:?}");
        }
    };
    wait_for("generation 1 is ready");
    let load = Load::start(LoadOptions::new(addr, 4));
    for _ in 0..3 {
        let answered = load.snapshot().answered;
        wait_until("answers", DEADLINE, || load.snapshot().answered > answered + 50);
        kill(Pid::from_raw(wrapper.0.id() as i32), Signal::SIGUSR2).expect("reload");
        wait_for("reload done");
    }
    load.stop().assert_nothing_failed();
    // Who reads at last finds whole lines.
    let mut start = vec![0; 200_000];
    File::from(unread).read_exact(&mut start).expect("read the flood");
    let text = String::from_utf8(start).expect("text");
    let lines = text.lines().collect::<Vec<_>>();
    let is_whole = |line: &&str| {
        line.split_once(' ')
            .is_some_and(|(label, text)| label.starts_with("0|") && ["1", "2", "3", "4"].contains(&text))
    };
    let odd: Vec<&&str> = lines[..lines.len() - 1].iter().filter(|line| !is_whole(line)).collect();
    assert!(odd.is_empty(), "{odd:?}");
    // The reader has gone by now; reuse-run ends in order all the same.
    kill(Pid::from_raw(wrapper.0.id() as i32), Signal::SIGTERM).expect("stop");
    wait_for("stopping");
    assert_eq!(wrapper.0.wait().expect("wait").code(), Some(0));
}

#[test]
fn a_worker_that_floods_does_not_starve_the_other() {
    let _turn = turn();
    let text = r#"[ $REUSE_RUN_SLOT = 0 ] && exec yes; i=0
        while [ $i -lt 300 ]; do echo "number $i"; i=$((i+1)); done; exec sleep 1000"#;
    let mut service = Service::run_ready("-n 2 --label --ready 1ms", &sh(text));
    service.wait_for_output("number 299");
    assert_eq!(service.out.count_of("number "), 300);
    service.signal(Signal::SIGTERM);
    assert_eq!(service.wait_exit().code(), Some(0));
}

#[test]
fn lines_of_the_log_stay_whole_among_long_lines_of_workers() {
    let _turn = turn();
    let text = r#"line=$(head -c 20000 /dev/zero | tr '\0' x)
        while :; do echo "$line" >&2; done"#;
    let mut service = Service::run_ready("-n 2 --label --ready 1ms", &sh(text));
    for _ in 0..10 {
        service.reload();
    }
    service.signal(Signal::SIGTERM);
    service.wait_end();
    let is_whole = |line: &str| {
        let is_log = line.starts_with("reuse-run[") && line.len() < 200;
        is_log
            || line.split_once(' ').is_some_and(|(label, text)| {
                label.contains('|') && label.len() < 20 && text.bytes().all(|byte| byte == b'x')
            })
    };
    let odd: Vec<String> =
        service.log.all().into_iter().map(|line| line.text).filter(|l| !is_whole(l)).collect();
    assert!(odd.is_empty(), "{:?}", odd.iter().map(|line| &line[..line.len().min(100)]).collect::<Vec<_>>());
    assert_eq!(service.log.count_of("reload done"), 10);
}

#[test]
fn without_it_the_workers_have_reuse_runs_own_stdout_and_stderr() {
    let mut service = Service::run_ready("-n 2 --ready 1ms", &["sleep", "1000"]);
    let link = |pid: u32, fd: u32| fs::read_link(format!("/proc/{pid}/fd/{fd}")).expect("an fd");
    for worker in service.workers() {
        for fd in [1, 2] {
            assert_eq!(link(worker, fd), link(service.pid(), fd));
        }
    }
    service.stop();
}

#[test]
fn with_it_no_descriptor_piles_up_over_30_reloads() {
    let _turn = turn();
    let addr = free_address();
    let mut service = Service::run_ready("-n 2 --label", &common::naive(addr));
    let settled = |service: &Service| {
        service.reload();
        service.reload();
        service.fds()
    };
    let before = settled(&service);
    for _ in 0..30 {
        service.reload();
    }
    wait_until("no more descriptors than before", DEADLINE, || service.fds() <= before);
    service.stop();
}

#[test]
fn a_failed_reload_shows_what_the_worker_at_fault_wrote_last() {
    let text = r#"[ $REUSE_RUN_GENERATION = 1 ] && exec sleep 1000
        for word in one two three four five six seven; do echo "$word" >&2; done; printf 'no newline' >&2; exit 3"#;
    let mut service = Service::run_ready("-n 1 --label --ready 1s", &sh(text));
    let mut command = reuse_run();
    let output = command.args(["reload", &service.pid().to_string()]).output().expect("reload");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    let expected = ["  four", "  five", "  six", "  seven", "  no newline"];
    assert_eq!(said.lines().filter(|line| line.starts_with("  ")).collect::<Vec<_>>(), expected, "{said}");
    service.stop();
}

#[test]
fn it_works_with_a_closed_stdout_and_for_a_server() {
    let addr = free_address();
    let mut command = Command::new("sh");
    command.args(["-c", r#"exec "$0" "$@" >&-"#]).arg(reuse_run().get_program());
    command.args(arguments("-n 2 --label", &common::naive(addr)));
    let mut service = Service::spawn(command);
    service.wait_for_line("generation 1 is ready");
    assert_eq!(get(addr).generation, Some(1));
    service.reload();
    assert_eq!(get(addr).generation, Some(2));
    common::holds_for("reuse-run is idle", Duration::from_millis(300), || service.workers().len() == 2);
    service.stop();
}
