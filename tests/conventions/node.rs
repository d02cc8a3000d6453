//! Node's IPC channel.

use std::net::SocketAddr;
use std::thread;

use nix::sys::signal::Signal;

use crate::common::load::{self, LoadOptions};
use crate::common::{
    DEADLINE, Folder, Service, app, free_address, get_path, naive, node_app, own_network, reload_under_load,
    reuse_run_with, run_words, turn,
};
use crate::{value_in, variable};

/// An ES module that sends these messages.
fn node(addr: SocketAddr, messages: &[&str]) -> Vec<String> {
    let command = ["node", &app("node/esm.mjs"), &addr.port().to_string()].map(str::to_owned);
    command.into_iter().chain(messages.iter().map(|message| (*message).to_owned())).collect()
}

/// An Express app that calls `process.send('ready')`, as for PM2.
#[track_caller]
fn assert_express_loses_no_request(options: &str) {
    let _turn = turn();
    own_network();
    let mut service = Service::run_ready(options, &["node", &node_app("express-process-send/app.js")]);
    reload_under_load(&service, LoadOptions::new(SocketAddr::from(([127, 0, 0, 1], 3000)), 16), 5);
    service.stop();
}

#[test]
fn an_express_app_that_says_ready_as_for_pm2_loses_no_request_with_ready_notify() {
    assert_express_loses_no_request("-n 2 --ready notify");
}

#[test]
fn an_express_app_that_says_ready_as_for_pm2_loses_no_request_with_ready_listen() {
    assert_express_loses_no_request("-n 2 --ready listen");
}

#[test]
fn a_node_es_module_loses_no_request_in_5_reloads() {
    let _turn = turn();
    let addr = free_address();
    let mut service = Service::run_ready("-n 2 --ready notify", &node(addr, &[]));
    reload_under_load(&service, LoadOptions::new(addr, 16), 5);
    service.stop();
}

#[test]
fn a_node_workers_channel_is_never_disconnected() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 1 --ready notify", &node(addr, &[]));
    for _ in 0..3 {
        let answer = get_path(addr, "/ipc");
        assert!(answer.body.contains(" connected=true send=function "), "{}", answer.body);
        service.reload();
    }
    service.stop();
    assert_eq!(service.out.count_of("disconnect"), 0, "{}", service.out.text());
}

#[test]
fn a_flood_of_messages_holds_up_neither_the_node_worker_nor_reuse_run() {
    let _turn = turn();
    let addr = free_address();
    let mut service = Service::run_ready("-n 1 --ready notify --drain 60s", &node(addr, &[]));
    let flooded = thread::spawn(move || load::get(addr, "/flood", DEADLINE).expect("an answer"));
    service.wait_for_output("flood ");
    let during = get_path(addr, "/");
    assert_eq!(during.origin.generation, Some(1));
    // A reload during the flood: the next generation serves, and the flood continues to its end.
    service.signal(Signal::SIGUSR2);
    let switched = service.wait_for_line("generation 2 serves");
    assert_eq!(get_path(addr, "/").origin.generation, Some(2));
    let answer = flooded.join().expect("the flood");
    assert!(answer.body.contains("called=100001"), "every send called back: {}", answer.body);
    assert_eq!(answer.origin.generation, Some(1));
    assert!(during.end < answer.end && switched.at < answer.end, "both were during the flood");
    service.wait_for_line("reload done");
    service.stop();
    assert_eq!(service.out.count_of("disconnect"), 0, "{}", service.out.text());
}

#[test]
fn the_message_online_also_means_ready() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 1 --ready notify", &node(addr, &[r#""online""#]));
    service.reload();
    service.stop();
}

#[test]
fn other_messages_of_a_node_worker_do_not_mean_ready() {
    let addr = free_address();
    let messages =
        [r#""started""#, r#"{"ready":true}"#, r#"["ready"]"#, r#""Ready""#, r#""ready\n""#, "true"];
    let mut service = Service::run("-n 1 --ready notify --ready-timeout 1500ms", &node(addr, &messages));
    assert_eq!(service.wait_end().code(), Some(1), "{}", service.log.text());
    assert!(service.log.text().contains("not ready within 1s 500ms"), "{}", service.log.text());
    assert!(!service.log.text().contains("generation 1 is ready"), "{}", service.log.text());
}

#[test]
fn with_no_node_ipc_there_is_no_channel() {
    let addr = free_address();
    let mut service = Service::run_ready("-n 1 --no-node-ipc", &node(addr, &[]));
    let answer = get_path(addr, "/ipc");
    assert!(answer.body.contains(" connected=undefined send=undefined fd=undefined"), "{}", answer.body);
    assert_eq!(value_in(&service, 1, "NODE_CHANNEL_FD"), None);
    assert_eq!(value_in(&service, 1, "NODE_CHANNEL_SERIALIZATION_MODE"), None);
    service.stop();
}

#[test]
fn a_node_that_another_program_starts_does_not_get_the_variable_of_a_channel_that_it_lacks() {
    // subprocess closes all fds and passes on all variables. With NODE_CHANNEL_FD that Node would die (EPIPE).
    let starter = "import os, socket, subprocess, time\n\
        code = subprocess.run([bytes.fromhex('6e6f6465'), '-e', 'process.exitCode = 7; process.send?.(1)']).returncode\n\
        print('its child exits with', code, flush=True)\n\
        time.sleep(1000)";
    let mut service = Service::run_ready("-n 1 --ready 10ms", &["python3", "-c", starter]);
    service.wait_for_output("its child exits with 7");
    assert_eq!(variable(service.workers()[0], "NODE_CHANNEL_FD"), None);
    service.stop();
}

#[test]
fn a_node_behind_a_script_has_its_channel() {
    let (addr, folder) = (free_address(), Folder::new());
    let script = format!("#!/bin/sh\nexec {}\n", node(addr, &[]).join(" "));
    let file = folder.write_with("serve", &script, 0o755);
    let mut service = Service::run_ready("-n 1 --ready notify", &[&file]);
    assert!(variable(service.workers()[0], "NODE_CHANNEL_FD").is_some());
    service.stop();
}

#[test]
fn a_node_behind_a_script_that_is_found_by_path_of_the_env_file_has_its_channel() {
    let (addr, folder) = (free_address(), Folder::new());
    let script = format!("#!/bin/sh\nexec {}\n", node(addr, &[]).join(" "));
    folder.write_with("serve-it", &script, 0o755);
    let path = format!("{}:{}", folder.path(""), std::env::var("PATH").expect("a PATH"));
    let file = folder.write("env", &format!("PATH='{path}'\n"));
    let options = format!("-n 1 --ready notify --ready-timeout 20s --env-file {file}");
    let mut service = Service::run_ready(&options, &["serve-it"]);
    assert!(variable(service.workers()[0], "NODE_CHANNEL_FD").is_some());
    service.stop();
}

#[test]
fn a_node_that_a_reload_brings_has_its_channel_and_what_comes_after_it_has_none() {
    let (addr, folder) = (free_address(), Folder::new());
    let ready = folder.write_with("serve", "#!/bin/sh\necho >&$READY_FD; exec \"$@\"\n", 0o755);
    let other = [vec![ready], naive(addr)].concat();
    let mut service = Service::run_ready("-n 2 --ready notify", &other);
    let has_channel = |generation| value_in(&service, generation, "NODE_CHANNEL_FD").is_some();
    assert!(!has_channel(1));
    for (generation, command) in [(2, node(addr, &[])), (3, other)] {
        let words = format!("reload {} -- {}", service.pid(), command.join(" "));
        run_words(&words).assert_done(&format!("2 workers of generation {generation} serve"));
        assert_eq!(has_channel(generation), generation == 2);
    }
    service.stop();
}

#[test]
fn workers_do_not_inherit_the_channel_of_reuse_run() {
    let addr = free_address();
    let mut command = reuse_run_with("-n 1 --no-node-ipc", &naive(addr));
    command.envs([("NODE_CHANNEL_FD", "9"), ("NODE_CHANNEL_SERIALIZATION_MODE", "advanced")]);
    let mut service = Service::spawn_ready(command);
    assert_eq!(value_in(&service, 1, "NODE_CHANNEL_FD"), None);
    service.stop();
}
