//! The units of docs/systemd.md and of the Debian package, under a systemd of their own.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use serde_json::json;

use crate::common::load::{Load, LoadOptions};
use crate::common::{DEADLINE, answered_more, get, join_network, needs_other_users, wait_until};
use crate::oci::{ADDRESS, Bundle, Container, Identity, Runtime};
use crate::packages::package;
use crate::{here, run};

/// A script that becomes the server, and one that fails.
const WORKS: &str = "#!/bin/sh\necho \"given: $1\"\nexec /srv/app --listen 0.0.0.0:8080\n";
const FAILS: &str = "#!/bin/sh\nexit 3\n";

/// A container whose PID 1 is this machine's systemd, with the Debian package and a service that runs the script /srv/run.
struct Machine {
    container: Container,
    service: &'static str,
    script: PathBuf,
}

impl Machine {
    /// With these files below /etc.
    fn start(service: &'static str, files: &[(&str, &str)]) -> Machine {
        let mut bundle = Bundle::debian(Identity::Root);
        let deb = bundle.folder.path("deb");
        run(Command::new("dpkg-deb").args(["--extract", &package(".deb"), &deb]));
        let machines = [
            ("passwd", "root:x:0:0::/root:/bin/sh\n"),
            ("group", "root:x:0:\n"),
            ("machine-id", "0123456789abcdef0123456789abcdef\n"),
        ];
        for (file, text) in machines.iter().chain(files) {
            let path = bundle.root("etc").join(file);
            fs::create_dir_all(path.parent().expect("its folder")).expect("make a folder");
            fs::write(&path, text).expect("write a file");
            if file.ends_with(".env") {
                fs::set_permissions(path, Permissions::from_mode(0o600)).expect("close it");
            }
        }
        fs::create_dir(bundle.root("srv")).expect("make a folder");
        let config = &mut bundle.config;
        config["process"]["args"] = json!(["/lib/systemd/systemd", "--unit=basic.target"]);
        config["process"]["env"] = json!(["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "container=oci"]);
        for set in config["process"]["capabilities"].as_object_mut().expect("capabilities").values_mut() {
            set.as_array_mut().expect("a set").push(json!("CAP_SYS_ADMIN"));
        }
        config["linux"]["namespaces"].as_array_mut().expect("namespaces").push(json!({"type": "cgroup"}));
        let mounts = config["mounts"].as_array_mut().expect("mounts");
        let usr = mounts.iter_mut().find(|mount| mount["destination"] == "/usr").expect("/usr");
        let layers = format!("lowerdir={deb}/usr:/usr");
        *usr = json!({"destination": "/usr", "type": "overlay", "source": "overlay", "options": [layers]});
        for folder in ["/run", "/tmp", "/var"] {
            mounts.push(json!({"destination": folder, "type": "tmpfs", "source": "tmpfs"}));
        }
        mounts.push(json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup"}));
        let script = bundle.root("srv/run");
        let container = bundle.start_as_configured(Runtime::Runc);
        let machine = Machine { container, service, script };
        machine.install(WORKS);
        wait_until("systemd is up", DEADLINE, || machine.systemctl("is-system-running").0);
        join_network(machine.container.pid());
        machine
    }

    /// Puts a script in the place of /srv/run.
    fn install(&self, text: &str) {
        let next = self.script.with_extension("next");
        fs::write(&next, text).expect("write a script");
        fs::set_permissions(&next, Permissions::from_mode(0o755)).expect("make it executable");
        fs::rename(next, &self.script).expect("put it there");
    }

    /// Whether this command of systemctl succeeds, and what it prints.
    fn systemctl(&self, words: &str) -> (bool, String) {
        let words: Vec<&str> = ["systemctl"].into_iter().chain(words.split(' ')).collect();
        let (status, text) = self.container.exec(&words);
        (status == Some(0), text.trim_end().to_owned())
    }

    /// `systemctl COMMAND SERVICE`.
    #[track_caller]
    fn assert(&self, command: &str, succeeds: bool) {
        let (status, text) = self.systemctl(&format!("{command} {}", self.service));
        assert_eq!(status, succeeds, "systemctl {command}: {text}\n{}", self.journal());
    }

    fn property(&self, name: &str) -> String {
        self.systemctl(&format!("show --value --property {name} {}", self.service)).1
    }

    fn journal(&self) -> String {
        self.container.exec(&["journalctl", "--no-pager", "--unit", self.service]).1
    }

    /// Signals the main process, and waits until systemd has started the service again.
    #[track_caller]
    fn restarts_after(&self, signal: &str) {
        let main = self.property("MainPID");
        self.assert(&format!("kill --kill-whom=main --signal={signal}"), true);
        let is_new = || ![main.as_str(), "0"].contains(&self.property("MainPID").as_str());
        wait_until("systemd starts it again", DEADLINE, is_new);
        wait_until("it serves", DEADLINE, || self.property("ActiveState") == "active");
    }
}

/// What one does with a service, and what may happen to it.
#[track_caller]
fn assert_works(machine: &Machine) {
    let serves = |generation: u32| {
        let status = format!("2 workers of generation {generation} serve");
        assert_eq!(machine.property("StatusText"), status, "{}", machine.journal());
    };
    machine.assert("start", true);
    serves(1);
    let (status, text) =
        machine.container.exec(&["reuse-run", "status", "--json", &machine.property("MainPID")]);
    assert!(status == Some(0) && text.contains("\"ready\":2,"), "{text}");
    let load = Load::start(LoadOptions::new(ADDRESS, 4));
    for generation in 2..=4 {
        answered_more(&load);
        machine.assert("reload", true);
        serves(generation);
    }
    machine.install(FAILS);
    machine.assert("reload", false);
    answered_more(&load);
    load.stop().assert_nothing_failed();
    serves(4);
    machine.install(WORKS);
    for signal in ["KILL", "STOP"] {
        machine.restarts_after(signal);
        serves(1);
        assert!(get(ADDRESS).pid.is_some());
    }
    machine.assert("stop", true);
    let end = ["ActiveState", "Result", "ExecMainStatus"].map(|name| machine.property(name));
    assert_eq!(end, ["inactive", "success", "0"], "{}", machine.journal());
}

/// As `systemctl edit` writes it.
const WATCHDOG: &str = "[Service]\nWatchdogSec=5s\n";

#[test]
fn the_unit_of_the_debian_package_starts_reloads_and_stops_a_service() {
    needs_other_users!();
    let variables = "COMMAND=/srv/run \"two words\"\nREUSE_RUN_WORKERS=2\nREUSE_RUN_STOP_WITHIN=30s\n";
    let machine = Machine::start(
        "reuse-run@app.service",
        &[
            ("reuse-run/app.env", variables),
            ("systemd/system/reuse-run@app.service.d/override.conf", WATCHDOG),
        ],
    );
    assert_works(&machine);
    assert!(machine.journal().contains("given: two words\n"), "{}", machine.journal());
}

#[test]
fn a_unit_of_ones_own_starts_reloads_and_stops_a_service() {
    needs_other_users!();
    let docs = fs::read_to_string(here("docs/systemd.md")).expect("the page");
    let monitoring = fs::read_to_string(here("docs/monitoring.md")).expect("the page");
    let with_pid = r#""$(systemctl show --value --property MainPID app)"`"#;
    assert!(docs.contains(&format!("`reuse-run status {with_pid}")));
    assert!(monitoring.contains(&format!("`reuse-run status --json {with_pid}")));
    let (_, unit) = docs.split_once("# app.service\n").expect("a unit");
    let (unit, rest) = unit.split_once("```").expect("its end");
    let (older, reload) = ("Type=notify", "ExecReload=/usr/local/bin/reuse-run reload $MAINPID");
    assert!(rest.contains(&format!("`{older}` and `{reload}`")), "{rest}");
    // systemctl learns by this way only that a reload has failed.
    let unit = unit.replace("Type=notify-reload", &format!("{older}\n{reload}"));
    let unit = unit.replace("/usr/local/bin", "/usr/bin").replace("WorkingDirectory=/srv/app\n", "");
    let unit = unit.replace("-n 4", "-n 2").replace("node app.js", "/srv/run");
    assert_works(&Machine::start(
        "app.service",
        &[("systemd/system/app.service", &unit), ("systemd/system/app.service.d/override.conf", WATCHDOG)],
    ));
}
