//! docs/gunicorn.md.

use std::fs;
use std::path::Path;

use nix::sys::signal::Signal;
use socket2::SockAddr;

use crate::common::load::{self, Load};
use crate::common::{
    DEADLINE, answered_more, at_once, get, get_path, needs_other_users, own_network, reload_under_load,
    wait_until,
};
use crate::{
    app, assert_long_request_is_answered_at_a_stop, assert_ready_when_loaded, every_command_loses_no_request,
    here, light, line, local, reload_loses_nothing, row, spans, start,
};

const PAGE: &str = "docs/gunicorn.md";
const PORT: u16 = 8000;
const WSGI: &str = "tests/servers/python-gunicorn/app.py";
const ASGI: &str = "tests/servers/python-uvicorn/app.py";
/// It says more.
const TELLS: &str = "tests/moving/app.py";

#[test]
fn gunicorn_loses_no_request_by_any_command_of_the_page() {
    every_command_loses_no_request(PAGE, " -- gunicorn ", &app("", WSGI), PORT);
}

#[test]
fn uvicorn_loses_no_request_by_any_command_of_the_page() {
    every_command_loses_no_request(PAGE, " -- uvicorn ", &app("", ASGI), PORT);
}

#[test]
fn waitress_loses_no_request_by_any_command_of_the_page() {
    every_command_loses_no_request(PAGE, " -- waitress-serve ", &app("", WSGI), PORT);
}

#[test]
fn servers_are_ready_when_they_have_loaded_the_app_gunicorn_only_with_preload() {
    let text = "import os, time\n\
        print('loads', flush=True)\n\
        while not os.path.exists('go'): time.sleep(0.02)\n\
        if os.path.exists('broken'): raise Exception('broken')";
    let [one, all] = ["--preload -w 1", "--preload -w 4"].map(|part| line(PAGE, part));
    let rows = [
        (one.replace("--preload", ""), WSGI, false),
        (one, WSGI, true),
        (all, WSGI, true),
        (line(PAGE, " -- uvicorn "), ASGI, true),
        (line(PAGE, " -- waitress-serve "), WSGI, true),
    ];
    at_once(rows, |(line, server, loads_first)| {
        assert_ready_when_loaded(&line, &app(text, server), PORT, loads_first);
    });
}

// What stays the same.

/// The options of the page that stay the same, with their values, without those that its command line has and the one for
/// another kind of apps.
fn kept() -> Vec<String> {
    let (page, line) = (fs::read_to_string(here(PAGE)).expect("a page"), line(PAGE, " -- gunicorn "));
    let cells = page.lines().map(|row| row.split(" | ").collect::<Vec<_>>());
    let rows = cells.filter(|cells| cells.len() > 1 && cells[1].starts_with("the same"));
    let options = rows.flat_map(|cells| spans(cells[0]));
    let with_value = options.filter(|option| option.starts_with('-') && option.contains(' '));
    with_value.filter(|option| !line.contains(option) && *option != "-k asgi").map(str::to_owned).collect()
}

/// The functions of gunicorn's configuration in the page's row that begins with this one.
fn functions(first: &str) -> Vec<String> {
    spans(&row(PAGE, first)[0]).filter(|code| !code.starts_with('-')).map(str::to_owned).collect()
}

/// A configuration whose functions print their names.
fn configuration(version: u32) -> String {
    let function = |name: &str| {
        let parameters = if ["post_fork", "worker_exit"].contains(&name) { "server, worker" } else { "it" };
        format!("def {name}({parameters}): print('{name}', flush=True)\n")
    };
    let all = ["`when_ready`", "`worker_abort`", "`on_reload`"].map(functions).concat();
    format!("print('configuration {version}', flush=True)\n")
        + &all.iter().map(|name| function(name)).collect::<String>()
}

/// Whether a process has this file open.
fn has_open(pid: u32, file: &str) -> bool {
    let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    fds.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|path| path == Path::new(file))
}

#[test]
fn gunicorns_options_and_functions_that_stay_the_same_do_what_they_did() {
    needs_other_users!();
    own_network();
    let folder = app("", TELLS);
    folder.write_with("gunicorn.conf.py", &configuration(1), 0o644);
    folder.write_with("access.log", "", 0o666);
    let options = kept();
    assert!(options.len() >= 7, "{options:?}");
    let mut service = start(&format!("{} {}", line(PAGE, " -- gunicorn "), options.join(" ")), &folder);
    let answer = get_path(local(PORT), "/first").body;
    assert!(answer.contains(" uid=65534 greeting=hello client=127.0."), "{answer}");
    wait_until("a control socket", DEADLINE, || folder.0.join(".gunicorn/gunicorn.ctl").exists());

    folder.write_with("gunicorn.conf.py", &configuration(2), 0o644);
    let load = Load::start(light(local(PORT)));
    answered_more(&load);
    service.reload();
    // Each process answers 120 requests at most.
    let again = || service.out.count_of("post_fork") > 4;
    wait_until("a process in the place of one that has answered enough", DEADLINE, again);
    answered_more(&load);
    load.stop().assert_nothing_failed();
    assert_eq!(service.out.count_of("configuration 2"), 2, "{}", service.out.text());

    // As logrotate does it.
    let old = folder.path("access.log.1");
    fs::rename(folder.path("access.log"), &old).expect("rename the log");
    folder.write_with("access.log", "", 0o666);
    service.signal(Signal::SIGUSR1);
    let is_closed = || !service.descendants().into_iter().any(|pid| has_open(pid, &old));
    wait_until("nobody has the old log open", DEADLINE, is_closed);
    get_path(local(PORT), "/second");
    let log = |path: &str| fs::read_to_string(path).expect("the log");
    wait_until("a line", DEADLINE, || log(&folder.path("access.log")).contains("GET /second"));
    assert!(log(&old).starts_with("127.0.") && log(&old).contains("GET /first"), "{}", log(&old));

    service.stop();
    for name in functions("`when_ready`") {
        assert!(service.out.count_of(&name) >= 4, "{name}: {}", service.out.text());
    }
    for name in functions("`on_reload`") {
        assert_eq!(service.out.count_of(&name), 0, "{name}");
    }
}

#[test]
fn gunicorn_kills_a_process_that_is_late_as_it_does_alone() {
    own_network();
    let folder = app("", TELLS);
    folder.write("gunicorn.conf.py", &configuration(1));
    let mut service = start(&format!("{} --timeout 1", line(PAGE, "--preload -w 4")), &folder);
    let workers = service.workers();
    let late = load::get(local(PORT), "/late", DEADLINE);
    assert!(late.is_err(), "{late:?}");
    assert!(service.log.text().contains("WORKER TIMEOUT"), "{}", service.log.text());
    assert_eq!(service.out.count_of("worker_abort"), 1, "{}", service.out.text());
    get(local(PORT));
    assert_eq!(service.workers(), workers, "the gunicorn lives");
    service.stop();
}

/// A command line with the page's option for a given socket.
fn with_given(line: &str) -> String {
    let cells = row(PAGE, "`gunicorn.socket`");
    let option = spans(&cells[1]).next().expect("an option");
    line.replace(" -- ", &format!(" {option} -- "))
}

#[test]
fn gunicorn_with_an_asgi_app_or_a_given_socket_loses_no_request() {
    let line = line(PAGE, " -- gunicorn ");
    let with_given = with_given(&line).replace(" -b 127.0.0.1:8000", "");
    at_once([(format!("{line} -k asgi"), ASGI), (with_given, WSGI)], |(line, server)| {
        own_network();
        let folder = app("", server);
        let mut service = start(&line, &folder);
        reload_loses_nothing(&service, local(PORT));
        wait_until("a master and a process of each", DEADLINE, || service.descendants().len() >= 4);
        assert_eq!(service.descendants().len(), 4);
        service.stop();
    });
}

#[test]
fn gunicorn_on_a_unix_socket_loses_no_request_and_ends_in_order() {
    own_network();
    let folder = app("", WSGI);
    let line = line(PAGE, " -- gunicorn ").replace("127.0.0.1:8000", "unix:app.sock");
    let mut service = start(&line, &folder);
    reload_under_load(&service, light(SockAddr::unix(folder.path("app.sock")).expect("an address")), 2);
    service.stop();
    assert!(!service.log.text().contains("Error"), "{}", service.log.text());
    assert!(!folder.0.join("app.sock").exists());
}

// What doesn't.

/// The options with values in the page's last column: of the server that is named before them, or else of reuse-run.
fn instead(of: &str) -> Vec<String> {
    let page = fs::read_to_string(here(PAGE)).expect("a page");
    let cells =
        page.lines().filter_map(|row| row.strip_prefix("| `")?.strip_suffix(" |")?.split(" | ").nth(2));
    let parts = cells.flat_map(|cell| cell.split("; "));
    let parts = parts.filter(|part| part.split_once(": ").map_or("reuse-run", |(server, _)| server) == of);
    let options = parts.flat_map(spans).filter(|option| option.starts_with("--") && option.contains(' '));
    options.map(str::to_owned).collect()
}

#[test]
fn the_options_to_write_for_another_server_are_known_and_with_a_unix_socket_no_request_is_lost() {
    let ours = instead("reuse-run");
    assert!(ours.len() >= 6, "{ours:?}");
    at_once(
        [("uvicorn", "--port 8000", ASGI), ("waitress", "--listen 127.0.0.1:8000", WSGI)],
        |(name, port, server)| {
            own_network();
            let folder = app("", server);
            folder.write("app.env", "GREETING=hello\n");
            let line = line(PAGE, &format!(" -- {name}"));
            let mut theirs = instead(name);
            theirs.retain(|option| !line.contains(option) && option != "--fd 3");
            assert!(theirs.len() >= 2, "{theirs:?}");
            let line = line.replace(port, &theirs.join(" "));
            let mut service = start(&line.replace(" -- ", &format!(" {} -- ", ours.join(" "))), &folder);
            reload_loses_nothing(&service, SockAddr::unix(folder.path("app.sock")).expect("an address"));
            assert!(folder.0.join("app.pid").exists());
            service.stop();
        },
    );
}

#[test]
fn uvicorn_with_a_given_socket_loses_no_request() {
    own_network();
    let fd = instead("uvicorn").into_iter().find(|option| option.starts_with("--fd ")).expect("an option");
    let line = with_given(&line(PAGE, " -- uvicorn ")).replace("--port 8000", &fd);
    let folder = app("", ASGI);
    let mut service = start(&line, &folder);
    reload_loses_nothing(&service, local(PORT));
    service.stop();
}

#[test]
fn with_gunicorns_pid_file_the_next_gunicorn_does_not_start() {
    own_network();
    let folder = app("", WSGI);
    let line = line(PAGE, "--preload -w 4");
    let mut service = start(&format!("{line} --pid gunicorn.pid"), &folder);
    let log = service.failing_reload();
    assert!(log.contains("Already running on PID"), "{log}");
    service.stop();
}

#[test]
fn sigwinch_does_nothing_and_sigusr1_ends_uvicorn_and_waitress() {
    at_once([(" -- uvicorn ", ASGI), (" -- waitress-serve ", WSGI)], |(part, server)| {
        own_network();
        let folder = app("", server);
        let mut service = start(&line(PAGE, part), &folder);
        let workers = service.workers();
        assert_eq!(service.descendants().len(), 2, "one process for each");
        service.signal(Signal::SIGWINCH);
        get(local(PORT));
        assert_eq!(service.workers(), workers);
        service.signal(Signal::SIGUSR1);
        let are_new = || service.workers().iter().all(|pid| !workers.contains(pid));
        wait_until("other workers", DEADLINE, are_new);
        assert!(service.log.text().contains("SIGUSR1"), "{}", service.log.text());
        service.stop();
    });
}

#[test]
fn at_a_stop_a_request_may_take_as_long_as_the_page_says() {
    assert_long_request_is_answered_at_a_stop(PAGE, "`--graceful-timeout 20`");
}
