//! HTTP/3: Caddy, and a client of aioquic.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::process::{Command, Stdio};

use common::{
    DEADLINE, Folder, Lines, Service, app, free_address, python_packages, reuse_run, send, wait_until,
};
use nix::sys::signal::Signal;

const RELOADS: usize = 10;
const CLIENTS: usize = 3;

/// A connection is known to one worker alone: what of it comes after the switch reaches another one.
#[test]
fn a_request_of_http_3_is_answered_or_if_its_connection_was_open_at_a_switch_the_second_one_is() {
    let (address, folder) = (free_address(), Folder::new());
    let tls = app("tls");
    let config = format!(
        "{{\n\tadmin off\n\tauto_https off\n\tlog {{\n\t\tlevel error\n\t}}\n}}\n\n\
         https://localhost:{} {{\n\tbind 127.0.0.1\n\ttls {tls}/cert.pem {tls}/key.pem\n\
         \trespond \"generation={{$REUSE_RUN_GENERATION}}\"\n}}\n",
        address.port(),
    );
    let path = folder.path("Caddyfile");
    std::fs::write(&path, config).expect("write its configuration");
    let mut command = reuse_run();
    command.args(["-n", "2", "--udp", "--quiet-after", "1s", "--", "caddy", "run", "--config", &path]);
    command.args(["--adapter", "caddyfile"]).env("HOME", folder.path("home"));
    let mut service = Service::spawn_ready(command);

    let mut client = Command::new("python3");
    client.arg(app("python/http3.py")).args([address.port().to_string(), CLIENTS.to_string()]);
    client.env("PYTHONPATH", python_packages("aioquic")).stdout(Stdio::piped());
    let mut client = client.spawn().expect("start the client");
    let lines = Lines::default();
    let reader = lines.read(client.stdout.take().expect("its output"));
    let wait_for = |generation: usize| {
        let text = format!("ok generation={generation}");
        wait_until(&text, DEADLINE, || lines.count_of(&text) >= 20);
    };
    for generation in 1..=RELOADS {
        wait_for(generation);
        service.reload();
    }
    wait_for(RELOADS + 1);
    send(client.id(), Signal::SIGTERM);
    client.wait().expect("the client's end");
    reader.join().expect("all lines are read");
    assert_eq!(lines.count_of("failed"), 0, "{}", lines.text());
    // Each client has at most one connection at a switch.
    assert!(lines.count_of("again") <= CLIENTS * RELOADS, "{}", lines.text());
    service.stop();
}
