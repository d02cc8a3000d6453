//! The examples in README.md and docs: the tool that each is for accepts it, and it does what the page says.
#![cfg_attr(clippy, deny(warnings))]

mod common;
#[path = "container/oci.rs"]
mod oci;

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::load::{Load, LoadOptions, Mode};
use common::{
    DEADLINE, Folder, Service, answered_more, get, join_network, load, naive, needs_other_users, node,
    own_network, reuse_run, wait_until,
};
use nix::sys::signal::Signal;
use oci::{Bundle, Container, Identity, Runtime, profile};
use serde_json::{Value, json};

/// Where the examples' app listens.
const ADDRESS: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 3000);
const CONTAINERS: &str = "docs/containers.md";
const KUBERNETES: &str = "docs/kubernetes.md";
const SYSTEMD: &str = "docs/systemd.md";
const SIGNAL_HANDLER: &str = "docs/signal-handler.md";
const MONITORING: &str = "docs/monitoring.md";

fn page(path: &str) -> String {
    fs::read_to_string(here(path)).expect("a page")
}

/// What a page's command says by --stop-within, in seconds.
fn stop_within(command: &Value) -> u64 {
    let words = words(command);
    let at = words.iter().position(|word| *word == "--stop-within").expect("--stop-within");
    words[at + 1].trim_end_matches('s').parse().expect("seconds")
}

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The fenced block of a page whose first line is a comment that begins with this name.
#[track_caller]
fn example(path: &str, name: &str) -> String {
    let page = page(path);
    let mut blocks = page.split("\n```").filter_map(|block| block.split_once('\n'));
    let begins = |text: &str| ["# ", "// "].iter().any(|mark| text.starts_with(&format!("{mark}{name}")));
    let (_, example) = blocks.find(|(_, text)| begins(text)).expect("an example on the page");
    format!("{example}\n")
}

/// An example as tests/readme/parse.py reads it. A mistake in the example fails the test.
#[track_caller]
fn parse(what: &str, page: &str, name: &str) -> Value {
    let (folder, packages) = (Folder::new(), here("target/readme-python"));
    assert!(packages.exists(), "{} is missing: run scripts/test", packages.display());
    let file = folder.path(name);
    fs::write(&file, example(page, name)).expect("write an example");
    let mut python = Command::new("python3");
    python.arg(here("tests/readme/parse.py")).args([what, &file]).env("PYTHONPATH", packages);
    let output = python.output().expect("run python3");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn words(list: &Value) -> Vec<&str> {
    list.as_array().expect("a list").iter().map(|word| word.as_str().expect("a word")).collect()
}

/// A container with the tests' Node and the examples' app.
fn with_app(identity: Identity, profile_name: &str) -> Bundle {
    let app = here("tests/readme").into_os_string().into_string().expect("UTF-8");
    let profile = profile(profile_name, identity, &[]);
    let bundle = Bundle::debian(identity).bind(&app, "/app").bind(&node(), "/node");
    let mut bundle = bundle.seccomp(profile);
    bundle.config["process"]["cwd"] = json!("/app");
    bundle
}

/// Starts a container with this entrypoint, which must be reuse-run, and this command.
#[track_caller]
fn start(bundle: Bundle, entrypoint: &Value, command: &Value) -> Container {
    let words = [words(entrypoint), words(command)].concat();
    assert_eq!(words[0], "reuse-run");
    let container = bundle.start(Runtime::Runc, &words[1..]);
    container.wait_until_ready();
    join_network(container.pid());
    container
}

#[track_caller]
fn succeeds(container: &Container, command: &Value) {
    let (status, text) = container.exec(&words(command));
    assert_eq!(status, Some(0), "{text}");
}

/// The words that follow these on a page.
#[track_caller]
fn command_after(path: &str, text: &str) -> Value {
    let page = page(path);
    let rest = page.split(text).nth(1).expect("a command on the page");
    let command = rest.split(['`', '\n']).next().expect("a command");
    json!(command.split(' ').collect::<Vec<_>>())
}

/// What the app answers.
#[track_caller]
fn body() -> String {
    load::get(SocketAddr::from(ADDRESS), "/", Duration::from_secs(15)).expect("an answer").body
}

/// A folder as the kubelet makes it of a ConfigMap: a link switches all of its content at once.
struct ConfigMap {
    folder: Folder,
}

impl ConfigMap {
    fn new(content: &str, mode: u32) -> ConfigMap {
        let map = ConfigMap { folder: Folder::new() };
        map.replace("..1", content, mode);
        symlink("..data/app.env", map.folder.path("app.env")).expect("make a link");
        map
    }

    fn replace(&self, version: &str, content: &str, mode: u32) {
        fs::create_dir(self.folder.path(version)).expect("make a folder");
        let file = self.folder.0.join(version).join("app.env");
        fs::write(&file, content).expect("write a file");
        fs::set_permissions(&file, fs::Permissions::from_mode(mode)).expect("chmod");
        chown(&file, Some(0), Some(1000)).expect("chown");
        symlink(version, self.folder.path("..new")).expect("make a link");
        fs::rename(self.folder.path("..new"), self.folder.path("..data")).expect("rename a link");
    }
}

#[test]
fn buildkit_accepts_the_dockerfile_whose_entrypoint_starts_and_whose_healthcheck_is_healthy() {
    needs_other_users!();
    let instructions = parse("dockerfile", CONTAINERS, "Dockerfile");
    let all: Vec<&Value> = instructions.as_array().expect("a list").iter().collect();
    let last = |name: &str| *all.iter().rfind(|instruction| instruction["cmd"] == name).expect(name);
    let known =
        ["FROM", "COPY", "ENV", "RUN", "WORKDIR", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"];
    assert!(all.iter().all(|instruction| known.iter().any(|known| instruction["cmd"] == *known)));
    for in_exec_form in ["ENTRYPOINT", "CMD", "HEALTHCHECK"] {
        assert_eq!(last(in_exec_form)["json"], true, "{in_exec_form}");
    }
    // The image takes its binary from the stage that builds it, by a script that exists.
    let stages: Vec<&Value> =
        all.iter().copied().filter(|instruction| instruction["cmd"] == "FROM").collect();
    assert_eq!(stages.len(), 2);
    assert_eq!(stages[0]["value"][0], format!("rust:{}", env!("CARGO_PKG_RUST_VERSION")));
    let from = format!("--from={}", words(&stages[0]["value"])[2]);
    assert!(all.iter().any(|instruction| instruction["flags"] == json!([from])), "no {from}");
    let run = words(&last("RUN")["value"])[0].split(' ').next().expect("a word").replace("/src/", "");
    assert!(here(&run).exists(), "no {run}");

    let mut bundle = with_app(Identity::User, "docker.json");
    bundle.config["process"]["user"] = json!({"uid": 1000, "gid": 1000}); // node's in that image
    bundle.config["process"]["cwd"] = last("WORKDIR")["value"][0].clone();
    let container = start(bundle, &last("ENTRYPOINT")["value"], &last("CMD")["value"]);
    let health = words(&last("HEALTHCHECK")["value"]);
    assert_eq!(health[0], "CMD");
    succeeds(&container, &json!(health[1..]));
    assert!(body().contains("generation=1"));
    container.stop();
}

#[test]
fn docker_compose_accepts_the_service_and_it_reloads_its_configuration_in_place() {
    needs_other_users!();
    let found = parse("compose", CONTAINERS, "compose.yaml");
    let service = &found["services"]["app"];
    assert_eq!(service["read_only"], true);
    assert_eq!(service["cap_drop"], json!(["ALL"]));
    assert_eq!(service["security_opt"], json!(["no-new-privileges:true"]));
    let grace = service["stop_grace_period"].as_str().expect("a duration").trim_end_matches('s');
    assert!(grace.parse::<u64>().expect("seconds") > stop_within(&service["entrypoint"]));

    let config = ConfigMap::new("GREETING=hello\n", 0o640);
    let bundle = with_app(Identity::Bare, "docker.json").bind(&config.folder.path(""), "/config");
    let mut bundle = bundle.read_only();
    bundle.config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let container = start(bundle, &service["entrypoint"], &service["command"]);
    assert!(body().contains("greeting=hello"));
    config.replace("..2", "GREETING=welcome\n", 0o640);
    succeeds(&container, &command_after(CONTAINERS, "docker compose exec app "));
    assert!(body().contains("greeting=welcome"));
    container.stop();
}

#[test]
fn kubernetes_accepts_the_deployment_whose_probes_pass_and_whose_config_map_is_reloaded_in_place() {
    needs_other_users!();
    let deployment = parse("deployment", KUBERNETES, "deployment.yaml");
    let pod = &deployment["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    let number = |value: &Value| value.as_u64().expect("a number");
    let before_stop = number(&container["lifecycle"]["preStop"]["sleep"]["seconds"]);
    assert!(number(&pod["terminationGracePeriodSeconds"]) > before_stop + stop_within(&container["command"]));
    assert_eq!(pod["securityContext"]["seccompProfile"], json!({"type": "RuntimeDefault"}));
    let rights = json!({
        "allowPrivilegeEscalation": false,
        "readOnlyRootFilesystem": true,
        "capabilities": {"drop": ["ALL"]},
    });
    assert_eq!(container["securityContext"], rights);

    let mode = number(&pod["volumes"][0]["configMap"]["defaultMode"]) as u32;
    let config = ConfigMap::new("GREETING=hello\n", mode);
    let path = container["volumeMounts"][0]["mountPath"].as_str().expect("a path");
    let bundle = with_app(Identity::Bare, "containerd.json").bind(&config.folder.path(""), path);
    let mut bundle = bundle.read_only();
    let (user, group) = (&pod["securityContext"]["runAsUser"], &pod["securityContext"]["fsGroup"]);
    bundle.config["process"]["user"] = json!({"uid": user, "gid": 0, "additionalGids": [group]});
    let running = start(bundle, &container["command"], &container["args"]);
    succeeds(&running, &container["startupProbe"]["exec"]["command"]);
    assert_eq!(container["readinessProbe"]["httpGet"], json!({"path": "/", "port": ADDRESS.1}));
    assert!(body().contains("greeting=hello"));

    config.replace("..2", "GREETING=welcome\n", mode);
    succeeds(&running, &command_after(KUBERNETES, "kubectl exec POD -- "));
    assert!(body().contains("greeting=welcome"));
    assert_eq!(running.service.log.count_of("warn"), 0, "{}", running.service.log.text());
    running.stop();
}

/// What `systemd-analyze verify` finds wrong with a unit, on a system that has reuse-run.
fn verify(unit: &str) -> String {
    let root = Folder::new();
    for folder in ["etc/systemd/system", "usr/lib/systemd", "usr/local/bin"] {
        fs::create_dir_all(root.path(folder)).expect("make folders");
    }
    fs::copy(reuse_run().get_program(), root.path("usr/local/bin/reuse-run")).expect("copy reuse-run");
    let units =
        ["/usr/lib/systemd/system", "/lib/systemd/system"].iter().find(|path| Path::new(path).exists());
    let copied = Command::new("cp")
        .args(["-r", units.expect("systemd's units"), &root.path("usr/lib/systemd")])
        .status();
    assert!(copied.expect("run cp").success());
    fs::write(root.path("etc/systemd/system/app.service"), unit).expect("write the unit");
    let mut verify = Command::new("systemd-analyze");
    let output = verify.args(["verify", &format!("--root={}", root.path("")), "app.service"]).output();
    let output = output.expect("run systemd-analyze");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}");
    text
}

#[test]
fn systemd_accepts_the_unit_and_its_form_for_an_older_systemd() {
    let unit = example(SYSTEMD, "app.service");
    let wrong = verify(&unit);
    let new = "Type=notify-reload\n";
    assert!(unit.contains(new));
    // systemd 252 warns of the type and of nothing else.
    let is_old = |line: &str| line.ends_with("Failed to parse service type, ignoring: notify-reload");
    assert!(wrong.lines().all(is_old), "{wrong}");

    let page = page(SYSTEMD);
    let paragraph =
        page.split("\n\n").find(|text| text.contains("needs systemd 253")).expect("what else to write");
    let old: Vec<&str> = paragraph
        .split('`')
        .filter(|code| *code == "Type=notify" || code.starts_with("ExecReload="))
        .collect();
    assert_eq!(old.len(), 2);
    assert_eq!(verify(&unit.replace(new, &format!("{}\n{}\n", old[0], old[1]))), "");
}

#[test]
fn the_units_commands_start_reload_and_stop_the_service() {
    own_network();
    let (unit, page) = (example(SYSTEMD, "app.service"), page(SYSTEMD));
    let value = |text: &str, name: &str| {
        let value = text.split(&format!("{name}=/usr/local/bin/reuse-run ")).nth(1).expect("a command");
        value.split(['\n', '`']).next().expect("a command").to_owned()
    };
    let mut command = reuse_run();
    command.args(value(&unit, "ExecStart").split(' ')).current_dir(here("tests/readme"));
    let mut service = Service::spawn(command);
    service.wait_for_line("generation 1 is ready");
    assert_eq!(get(ADDRESS.into()).generation, Some(1));

    // First as notify-reload does it, then as the page says for an older systemd.
    service.signal(Signal::SIGHUP);
    wait_until("a reload", DEADLINE, || service.log.count_of("reload done") == 1);
    let reload = value(&page, "ExecReload").replace("$MAINPID", &service.pid().to_string());
    let output = reuse_run().args(reload.split(' ')).output().expect("run reuse-run");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(get(ADDRESS.into()).generation, Some(3));
    service.stop();
}

// Monitoring.

/// The figures that the page's script writes, by name and labels.
fn figures(folder: &Folder) -> BTreeMap<String, f64> {
    let example = example(MONITORING, "reuse-run.prom.sh");
    let (text, file) = ("/var/lib/prometheus/node-exporter/reuse_run.prom", folder.path("reuse_run.prom"));
    assert!(example.contains(text));
    let programs = Path::new(reuse_run().get_program()).parent().expect("a folder").to_owned();
    let path = format!("{}:{}", programs.display(), std::env::var("PATH").expect("PATH"));
    let script = example.replace(text, &file);
    let status = Command::new("sh").args(["-c", &script]).env("PATH", path).status().expect("run sh");
    assert!(status.success());
    let written = fs::read_to_string(&file).expect("the figures");
    let lines = written.lines().filter(|line| !line.starts_with("# "));
    let figure = |line: &str| {
        let (name, value) = line.split_once(' ').expect("a name and a value");
        (name.to_owned(), value.parse().expect("a number"))
    };
    lines.map(figure).collect()
}

#[test]
fn the_script_for_prometheus_writes_the_figures_of_a_service_and_that_it_does_not_run() {
    own_network();
    let folder = Folder::new();
    let mut service = Service::run_ready("-n 2", &naive(ADDRESS.into()));
    assert_eq!(figures(&folder).get("reuse_run_last_reload_ok"), None);
    service.reload();
    let figures_of = figures(&folder);
    for (name, value) in
        [("up", 1.0), ("slots", 2.0), ("ready", 2.0), ("generation", 2.0), ("last_reload_ok", 1.0)]
    {
        assert_eq!(figures_of.get(&format!("reuse_run_{name}")), Some(&value), "{figures_of:?}");
    }
    for name in ["restarts", "waiting", "connections", "memory_bytes", "cpu_seconds_total"] {
        for slot in 0..2 {
            let figure = figures_of.get(&format!("reuse_run_{name}{{slot=\"{slot}\"}}"));
            assert!(
                figure.is_some_and(|figure| *figure > 0.0 || name != "memory_bytes"),
                "{name} {slot}: {figures_of:?}"
            );
        }
    }
    service.stop();
    assert_eq!(figures(&folder), BTreeMap::from([("reuse_run_up".to_owned(), 0.0)]));
}

// The signal handler.

#[test]
fn the_signal_handler_loses_no_request_of_clients_that_ask_without_a_pause() {
    own_network();
    let folder = Folder::new();
    fs::write(folder.path("app.js"), example(SIGNAL_HANDLER, "app.js")).expect("write the app");
    let mut service = Service::run_ready("-n 2 --drain 1s", &["node", &folder.path("app.js")]);
    let mode = Mode::KeepAlive { think: Duration::ZERO };
    let load = Load::start(LoadOptions::new(SocketAddr::from(ADDRESS), 16).mode(mode));
    answered_more(&load);
    for _ in 0..5 {
        service.reload();
        answered_more(&load);
    }
    let report = load.stop();
    report.assert_nothing_failed();
    assert_eq!(report.counts.generations.len(), 6, "{report}");
    service.stop();
}

// The README's transcripts.

/// A line with `0` for each number, one space between two words, and `0s` for each short time.
fn shape(line: &str) -> String {
    let mut shape = String::new();
    for c in line.chars() {
        match c {
            '0'..='9' | '.' if shape.ends_with('0') => {}
            '0'..='9' => shape.push('0'),
            c => shape.push(c),
        }
    }
    let words = shape.split_whitespace().map(|word| word.replace("0ms", "0s"));
    words.collect::<Vec<_>>().join(" ")
}

/// What the README shows under `$ COMMAND`, where it does so for the `nth` time, as shapes of lines.
#[track_caller]
fn transcript(command: &str, nth: usize) -> Vec<String> {
    let readme = page("README.md");
    let begin = format!("    $ {command}\n");
    let rest = readme.split(&begin).nth(1 + nth).expect("a transcript");
    rest.lines().take_while(|line| line.starts_with("    ")).map(shape).collect()
}

#[test]
fn reload_and_status_print_what_the_readme_shows() {
    own_network();
    let folder = Folder::new();
    let (app, file) =
        (fs::read_to_string(here("tests/readme/app.js")).expect("the app"), folder.path("app.js"));
    fs::write(&file, &app).expect("write the app");
    let mut service = Service::run_ready(&format!("-n 2 -C {}", folder.path("")), &["node", "app.js"]);
    let pid = service.pid().to_string();
    let lines = |command: &str| {
        let output = reuse_run().args([command, &pid]).output().expect("run reuse-run");
        let text = [output.stdout, output.stderr].concat();
        String::from_utf8(text).expect("UTF-8").lines().map(shape).collect::<Vec<_>>()
    };
    assert_eq!(lines("reload"), transcript("reuse-run reload", 0));
    fs::write(&file, "process.exit(1)").expect("write the app");
    assert_eq!(lines("reload"), transcript("reuse-run reload", 1));
    wait_until("the end of the failed workers", DEADLINE, || lines("status")[0].contains("serving"));
    assert_eq!(lines("status"), transcript("reuse-run status", 0));
    service.stop();
}
