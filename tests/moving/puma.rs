//! docs/puma.md.

use std::fs;

use nix::sys::signal::Signal;

use crate::common::{DEADLINE, Folder, Service, at_once, own_network, wait_until};
use crate::{
    app, assert_long_request_is_answered_at_a_stop, assert_ready_when_loaded, every_command_loses_no_request,
    line, local, reload_loses_nothing, row, spans, start,
};

const PAGE: &str = "docs/puma.md";
const PORT: u16 = 9292;
const APP: &str = "tests/servers/ruby-puma/config.ru";

/// A folder with the app, which begins with these lines, and with this configuration.
fn configured(begin: &str, configuration: &str) -> Folder {
    let folder = app(begin, APP);
    fs::create_dir(folder.path("config")).expect("make a folder");
    folder.write("config/puma.rb", configuration);
    folder
}

#[test]
fn puma_loses_no_request_by_any_command_of_the_page() {
    every_command_loses_no_request(PAGE, "puma -w 0", &app("", APP), PORT);
}

#[test]
fn puma_is_ready_when_it_has_loaded_the_app_as_a_cluster_with_preload() {
    let text = "puts 'loads'\n$stdout.flush\n\
        sleep 0.02 until File.exist? 'go'\n\
        raise 'broken' if File.exist? 'broken'";
    let [single, cluster] = ["puma -w 0", "puma -w 4"].map(|part| line(PAGE, part));
    let rows = [(cluster.replace("--preload", ""), false), (cluster, true), (single, true)];
    at_once(rows, |(line, loads_first)| {
        let folder = configured(text, "preload_app! false");
        assert_ready_when_loaded(&line, &folder, PORT, loads_first);
    });
}

/// The functions of Puma's configuration that are never called.
fn functions() -> Vec<String> {
    let rows = ["`before_fork`", "`on_restart`"].map(|begin| row(PAGE, begin)[0].clone());
    rows.iter().flat_map(|cell| spans(cell)).map(str::to_owned).collect()
}

/// A configuration for a cluster, whose functions print their names.
fn configuration() -> String {
    let function = |name: &String| format!("{name} {{ puts '{name}'; $stdout.flush }}\n");
    "workers 3\n".to_owned() + &functions().iter().map(function).collect::<String>()
}

#[test]
fn pumas_functions_for_forks_and_restarts_are_called_by_a_cluster_and_at_sigusr1_alone() {
    own_network();
    let folder = configured("", &configuration());
    let printed = |service: &Service| {
        functions().into_iter().filter(|name| service.out.count_of(name) > 0).collect::<Vec<_>>()
    };
    let mut cluster = start(&line(PAGE, "puma -w 4"), &folder);
    wait_until("what a cluster calls", DEADLINE, || printed(&cluster) == ["before_fork", "on_worker_boot"]);
    cluster.stop();

    let mut service = start(&line(PAGE, "puma -w 0"), &folder);
    reload_loses_nothing(&service, local(PORT));
    assert_eq!(printed(&service), [""; 0], "{}", service.out.text());
    let workers = service.workers();
    service.signal(Signal::SIGUSR1);
    wait_until("each restarts", DEADLINE, || service.out.count_of("on_restart") == 2);
    assert_eq!(service.workers(), workers);
    wait_until("each serves again", DEADLINE, || service.out.count_of("Use Ctrl-C to stop") == 6);
    service.stop();
}

#[test]
fn puma_with_a_given_socket_loses_no_request() {
    own_network();
    let given = row(PAGE, "`puma.socket`")[1].clone();
    let given = spans(&given).next().expect("an option");
    let folder = app("", APP);
    let mut service = start(&line(PAGE, "puma -w 0").replace(" -- ", &format!(" {given} -- ")), &folder);
    reload_loses_nothing(&service, local(PORT));
    service.stop();
    assert_eq!(service.out.count_of("Activated tcp://127.0.0.1:9292"), 4, "{}", service.out.text());
}

#[test]
fn a_second_puma_does_not_start_on_a_unix_socket() {
    own_network();
    let folder = app("", APP);
    let bind =
        line(PAGE, "puma -w 0").replace("-n 2", "-n 1").replace("tcp://127.0.0.1:9292", "unix://app.sock");
    let mut service = start(&bind, &folder);
    let log = service.failing_reload();
    assert!(log.contains("There is already a server bound"), "{log}");
    service.stop();
}

#[test]
fn at_a_stop_a_request_may_take_as_long_as_the_page_says() {
    assert_long_request_is_answered_at_a_stop(PAGE, "`worker_shutdown_timeout 30`");
}
