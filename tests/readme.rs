//! The README's examples: each is what its own parser takes, and does what it is there for.

mod common;
#[path = "container/oci.rs"]
mod oci;

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::{DEADLINE, Folder, Service, get, join_network, load, own_network, reuse_run, wait_until};
use nix::sys::signal::Signal;
use oci::{Bundle, Container, Identity, Runtime, profile};
use serde_json::{Value, json};

/// Where the README's app listens.
const ADDRESS: (Ipv4Addr, u16) = (Ipv4Addr::LOCALHOST, 3000);
/// How long a worker may take to end unless --stop-timeout says otherwise.
const STOP_TIMEOUT: u64 = 30;

fn readme() -> String {
    fs::read_to_string(here("README.md")).expect("the README")
}

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The fenced block whose first line begins with `# NAME`.
fn example(name: &str) -> String {
    let readme = readme();
    let mut blocks = readme.split("\n```").filter_map(|block| block.split_once('\n'));
    let begin = format!("# {name}");
    let (_, example) = blocks.find(|(_, text)| text.starts_with(&begin)).expect("an example in the README");
    format!("{example}\n")
}

/// What tests/readme/parse.py makes of an example; what is wrong with it fails the test.
#[track_caller]
fn parse(what: &str, name: &str) -> Value {
    let (folder, packages) = (Folder::new(), here("target/readme-python"));
    assert!(packages.exists(), "{} is missing: run scripts/test", packages.display());
    let file = folder.path(name);
    fs::write(&file, example(name)).expect("write an example");
    let mut python = Command::new("python3");
    python.arg(here("tests/readme/parse.py")).args([what, &file]).env("PYTHONPATH", packages);
    let output = python.output().expect("run python3");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn words(list: &Value) -> Vec<&str> {
    list.as_array().expect("a list").iter().map(|word| word.as_str().expect("a word")).collect()
}

/// A container with this machine's Node and the README's app.
fn with_app(identity: Identity, profile_name: &str) -> Bundle {
    let app = here("tests/readme").into_os_string().into_string().expect("UTF-8");
    let profile = profile(profile_name, identity, &[]);
    let mut bundle = Bundle::debian(identity).bind(&app, "/app").seccomp(profile);
    bundle.config["process"]["cwd"] = json!("/app");
    bundle
}

/// Starts an entrypoint, which has to be reuse-run's, and a command.
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

/// The words that follow these in the README's text.
fn command_after(text: &str) -> Value {
    let readme = readme();
    let rest = readme.split(text).nth(1).expect("a command in the README");
    let command = rest.split(['`', '\n']).next().expect("a command");
    json!(command.split(' ').collect::<Vec<_>>())
}

/// What the app answers.
#[track_caller]
fn body() -> String {
    load::get(SocketAddr::from(ADDRESS), "/", Duration::from_secs(15)).expect("an answer").body
}

/// A configuration folder as the kubelet makes it of a ConfigMap, whose content changes at once by a link.
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
fn the_dockerfile_is_one_to_buildkit_and_its_entrypoint_starts_and_its_healthcheck_is_healthy() {
    let instructions = parse("dockerfile", "Dockerfile");
    let all: Vec<&Value> = instructions.as_array().expect("a list").iter().collect();
    let last = |name: &str| *all.iter().rfind(|instruction| instruction["cmd"] == name).expect(name);
    let known = ["FROM", "COPY", "RUN", "WORKDIR", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"];
    assert!(all.iter().all(|instruction| known.iter().any(|known| instruction["cmd"] == *known)));
    for in_exec_form in ["ENTRYPOINT", "CMD", "HEALTHCHECK"] {
        assert_eq!(last(in_exec_form)["json"], true, "{in_exec_form}");
    }
    // The stage that builds is the one that the image takes its binary from, by a script that there is.
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
fn docker_compose_takes_the_service_which_reloads_its_configuration_in_place() {
    let found = parse("compose", "compose.yaml");
    let service = &found["services"]["app"];
    assert_eq!(service["read_only"], true);
    assert_eq!(service["cap_drop"], json!(["ALL"]));
    assert_eq!(service["security_opt"], json!(["no-new-privileges:true"]));
    let grace = service["stop_grace_period"].as_str().expect("a duration").trim_end_matches('s');
    assert!(grace.parse::<u64>().expect("seconds") > STOP_TIMEOUT);

    let config = ConfigMap::new("GREETING=hello\n", 0o640);
    let bundle = with_app(Identity::Bare, "docker.json").bind(&config.folder.path(""), "/config");
    let mut bundle = bundle.read_only();
    bundle.config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let container = start(bundle, &service["entrypoint"], &service["command"]);
    assert!(body().contains("greeting=hello"));
    config.replace("..2", "GREETING=welcome\n", 0o640);
    succeeds(&container, &command_after("docker compose exec app "));
    assert!(body().contains("greeting=welcome"));
    container.stop();
}

#[test]
fn kubernetes_takes_the_deployment_whose_probes_pass_and_whose_config_map_is_reloaded_in_place() {
    let deployment = parse("deployment", "deployment.yaml");
    let pod = &deployment["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    let number = |value: &Value| value.as_u64().expect("a number");
    let before_stop = number(&container["lifecycle"]["preStop"]["sleep"]["seconds"]);
    assert!(number(&pod["terminationGracePeriodSeconds"]) > before_stop + STOP_TIMEOUT);
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
    succeeds(&running, &command_after("kubectl exec POD -- "));
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
fn systemd_takes_the_unit_also_as_it_is_to_be_written_for_an_old_one() {
    let unit = example("app.service");
    let wrong = verify(&unit);
    let new = "Type=notify-reload\n";
    assert!(unit.contains(new));
    // systemd 252, which has nothing to say of the rest.
    let is_old = |line: &str| line.ends_with("Failed to parse service type, ignoring: notify-reload");
    assert!(wrong.lines().all(is_old), "{wrong}");

    let readme = readme();
    let paragraph =
        readme.split("\n\n").find(|text| text.contains("takes systemd 253")).expect("what else to write");
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
    let (unit, readme) = (example("app.service"), readme());
    let value = |text: &str, name: &str| {
        let value = text.split(&format!("{name}=/usr/local/bin/reuse-run ")).nth(1).expect("a command");
        value.split(['\n', '`']).next().expect("a command").to_owned()
    };
    let mut command = reuse_run();
    command.args(value(&unit, "ExecStart").split(' ')).current_dir(here("tests/readme"));
    let mut service = Service::spawn(command);
    service.wait_for_line("generation 1 is ready");
    assert_eq!(get(ADDRESS.into()).generation, Some(1));

    // notify-reload, then what is to be written for an old systemd.
    service.signal(Signal::SIGHUP);
    wait_until("a reload", DEADLINE, || service.log.count_of("reload done") == 1);
    let reload = value(&readme, "ExecReload").replace("$MAINPID", &service.pid().to_string());
    let output = reuse_run().args(reload.split(' ')).output().expect("run reuse-run");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(get(ADDRESS.into()).generation, Some(3));
    service.stop();
}
