//! OCI bundles, and runc and crun to run them.
#![allow(dead_code)]

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::common::load::{Load, LoadOptions};
use crate::common::{
    DEADLINE, Folder, Process, Service, answered_more, example, join_network, server, wait_until,
};

/// The address of the servers.
pub const ADDRESS: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 8080));
/// The capabilities that Docker gives a container by default.
const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];
const CAPABILITIES_AS_MASK: &str = "00000000a80425fb";
const USER: u32 = 65532;

#[derive(Clone, Copy)]
pub enum Runtime {
    Runc,
    Crun,
}

impl Runtime {
    fn command(self, folder: &Folder) -> Command {
        let state = format!("--root={}", folder.path("state"));
        match self {
            Runtime::Runc => {
                let mut command = Command::new("runc");
                command.arg(state);
                command
            }
            Runtime::Crun => {
                // crun fails if version 1 of cgroups is mounted too, so it sees only version 2.
                let text = r#"mount -t cgroup2 none /sys/fs/cgroup && exec crun "$@""#;
                let mut command = Command::new("unshare");
                command.args(["--mount", "sh", "-c", text, "crun", &state]);
                command
            }
        }
    }
}

/// User and capabilities of PID 1.
#[derive(Clone, Copy, Debug)]
pub enum Identity {
    /// As with `docker run` when the image names no user.
    Root,
    /// As with `docker run` when the image names a user: no capabilities, but a file could give some.
    User,
    /// As with `--cap-drop ALL --security-opt no-new-privileges`, and in Kubernetes' restricted pods.
    Bare,
}

impl Identity {
    fn process(self) -> Value {
        let (user, bounding, effective): (u32, &[&str], &[&str]) = match self {
            Identity::Root => (0, &CAPABILITIES, &CAPABILITIES),
            Identity::User => (USER, &CAPABILITIES, &[]),
            Identity::Bare => (USER, &[], &[]),
        };
        json!({
            "user": {"uid": user, "gid": user},
            "cwd": "/",
            "env": ["PATH=/:/usr/bin:/bin"],
            "capabilities": {"bounding": bounding, "permitted": effective, "effective": effective},
            "noNewPrivileges": matches!(self, Identity::Bare),
        })
    }

    /// Lines of /proc/PID/status, without NoNewPrivs, which reuse-run may set itself.
    pub fn status(self) -> [String; 3] {
        let none = "0000000000000000";
        let (user, bounding, effective) = match self {
            Identity::Root => (0, CAPABILITIES_AS_MASK, CAPABILITIES_AS_MASK),
            Identity::User => (USER, CAPABILITIES_AS_MASK, none),
            Identity::Bare => (USER, none, none),
        };
        [
            format!("Uid:\t{user}\t{user}\t{user}\t{user}"),
            format!("CapBnd:\t{bounding}"),
            format!("CapEff:\t{effective}"),
        ]
    }
}

/// A profile of tests/container/profiles as `linux.seccomp` of an OCI configuration, without the system calls in `less`.
pub fn profile(name: &str, identity: Identity, less: &[&str]) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/container/profiles").join(name);
    let text = fs::read_to_string(path).expect("a profile");
    let profile: Value = serde_json::from_str(&text).expect("a profile in JSON");
    let has = |capability: &Value| match identity {
        Identity::Root | Identity::User => CAPABILITIES.iter().any(|name| capability == name),
        Identity::Bare => false,
    };
    let applies = |rule: &&Value| rule.get("with").is_none_or(has) && !rule.get("without").is_some_and(has);
    let rules = profile["syscalls"].as_array().expect("rules").iter().filter(applies).map(|rule| {
        let mut rule = rule.clone();
        rule["names"].as_array_mut().expect("names").retain(|name| !less.iter().any(|less| name == less));
        rule.as_object_mut().expect("a rule").retain(|key, _| key != "with" && key != "without");
        rule
    });
    let rules: Vec<Value> = rules.filter(|rule| rule["names"] != json!([])).collect();
    json!({
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "syscalls": rules,
    })
}

/// The path of the program that scripts/build-static has built.
pub fn static_binary() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or("target".into(), PathBuf::from);
    let release = format!("{}-unknown-linux-gnu/release", std::env::consts::ARCH);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(target).join(release).join("reuse-run");
    assert!(path.exists(), "{} is missing: run scripts/build-static", path.display());
    path
}

/// A root filesystem and an OCI configuration.
pub struct Bundle {
    pub folder: Folder,
    pub config: Value,
}

impl Bundle {
    /// A root that holds only the static binary and the static server, no folder.
    pub fn empty(identity: Identity) -> Bundle {
        let folder = Folder::new();
        let root = folder.0.join("root");
        fs::create_dir(&root).expect("make the root");
        for (name, program) in [("reuse-run", static_binary()), ("server", example("static-server").into())] {
            fs::copy(program, root.join(name)).expect("copy a program");
        }
        let process = identity.process();
        let config = json!({
            "ociVersion": "1.0.2",
            "process": process,
            "root": {"path": "root", "readonly": false},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "ro"]},
            ],
            "linux": {
                "namespaces": [
                    {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                ],
                "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            },
        });
        Bundle { folder, config }
    }

    /// The same with a static busybox as shell.
    pub fn with_shell(identity: Identity) -> Bundle {
        let bundle = Bundle::empty(identity);
        fs::copy("/bin/busybox", bundle.root("busybox")).expect("copy busybox");
        bundle
    }

    /// Alpine's layout: musl and busybox, no glibc, and a server that needs musl.
    pub fn alpine(identity: Identity) -> Bundle {
        let bundle = Bundle::empty(identity);
        for folder in ["bin", "etc", "home", "lib", "opt", "root", "run", "sbin", "srv", "tmp", "usr", "var"]
        {
            fs::create_dir(bundle.root(folder)).expect("make a folder");
        }
        fs::copy("/bin/busybox", bundle.root("bin/busybox")).expect("copy busybox");
        symlink("/bin/busybox", bundle.root("bin/sh")).expect("make a link");
        let musl = format!("lib/ld-musl-{}.so.1", std::env::consts::ARCH);
        fs::copy(Path::new("/").join(&musl), bundle.root(&musl)).expect("copy musl");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/container/alpine.c");
        let compiled = Command::new("musl-gcc").arg(source).arg("-o").arg(bundle.root("srv/app")).status();
        assert!(compiled.expect("run musl-gcc").success());
        bundle
    }

    /// The files of this Debian, and the test server, which needs its glibc.
    pub fn debian(identity: Identity) -> Bundle {
        let bundle = Bundle::empty(identity);
        for folder in ["bin", "lib", "lib64", "sbin"] {
            if let Ok(target) = fs::read_link(Path::new("/").join(folder)) {
                symlink(target, bundle.root(folder)).expect("make a link");
            }
        }
        bundle.bind("/usr", "/usr").bind(&server(), "/srv/app")
    }

    /// Mounts a file or folder of this machine in the container, read-only.
    pub fn bind(mut self, source: &str, destination: &str) -> Bundle {
        let mounts = self.config["mounts"].as_array_mut().expect("mounts");
        let options = ["bind", "ro", "nosuid", "nodev"];
        mounts
            .push(json!({"destination": destination, "type": "none", "source": source, "options": options}));
        self
    }

    pub fn root(&self, path: &str) -> PathBuf {
        self.folder.0.join("root").join(path)
    }

    pub fn read_only(mut self) -> Bundle {
        // On a read-only root the runtime can't make these.
        for name in ["proc", "dev", "sys"] {
            fs::create_dir(self.root(name)).expect("make a folder to mount on");
        }
        self.config["root"]["readonly"] = json!(true);
        self
    }

    pub fn seccomp(mut self, profile: Value) -> Bundle {
        self.config["linux"]["seccomp"] = profile;
        self
    }

    /// Starts the container with `reuse-run ARGUMENTS` as PID 1.
    pub fn start(mut self, runtime: Runtime, arguments: &[&str]) -> Container {
        self.config["process"]["args"] = ["reuse-run"].iter().chain(arguments).copied().collect();
        self.start_as_configured(runtime)
    }

    /// Starts the container with the command in its configuration as PID 1.
    pub fn start_as_configured(self, runtime: Runtime) -> Container {
        fs::write(self.folder.path("config.json"), self.config.to_string()).expect("write config.json");
        let name = self.folder.0.file_name().expect("a name").to_str().expect("UTF-8").to_owned();
        let mut command = runtime.command(&self.folder);
        command.args(["run", "--bundle", &self.folder.path(""), &name]);
        Container { service: Service::spawn(command), runtime, name, folder: self.folder }
    }

    /// Starts the container, waits until the first generation is ready, and moves this thread into its network.
    #[track_caller]
    pub fn start_ready(self, runtime: Runtime, arguments: &[&str]) -> (Container, SocketAddr) {
        let container = self.start(runtime, arguments);
        container.wait_until_ready();
        join_network(container.pid());
        (container, ADDRESS)
    }
}

pub struct Container {
    /// The runtime, which runs as long as the container and prints its output.
    pub service: Service,
    runtime: Runtime,
    pub name: String,
    folder: Folder,
}

impl Container {
    pub fn runtime(&self, arguments: &[&str]) -> Output {
        self.runtime.command(&self.folder).args(arguments).output().expect("run the runtime")
    }

    #[track_caller]
    pub fn wait_until_ready(&self) {
        // An error may come from the runtime or from reuse-run.
        let over = |line: &str| line.contains("generation 1 is ready") || line.contains("error");
        let line = self.service.wait_for_line_where(0, "says how the start went", over);
        assert!(line.text.contains("reuse-run[1]: generation 1 is ready"), "{}", self.service.log.text());
    }

    /// The pid of PID 1 outside the container.
    pub fn pid(&self) -> u32 {
        let output = self.runtime(&["state", &self.name]);
        let state: Value = serde_json::from_slice(&output.stdout).expect("the state of the container");
        state["pid"].as_u64().expect("a pid") as u32
    }

    /// Runs a command in the container. Returns its status, and what it has printed.
    pub fn exec(&self, command: &[&str]) -> (Option<i32>, String) {
        let output = self.runtime(&[&["exec", &self.name], command].concat());
        let text = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&text).into_owned())
    }

    /// All processes in its PID namespace.
    fn processes(&self) -> Vec<u32> {
        let namespace = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let its = namespace(self.pid()).expect("the PID namespace of the container");
        let entries = fs::read_dir("/proc").expect("read /proc").flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid| namespace(*pid).as_ref() == Some(&its)).collect()
    }

    /// Reloads under load by a command in the container, and asserts that the status is right and that no request fails; if
    /// `atomic`, also that each switch is.
    #[track_caller]
    pub fn assert_reloads_lose_nothing(&self, addr: SocketAddr, atomic: bool) {
        let load = Load::start(LoadOptions::new(addr, 4).path("/sleep/30").record());
        answered_more(&load);
        for generation in 2..=4 {
            let (status, text) = self.exec(&["reuse-run", "reload"]);
            assert_eq!(status, Some(0), "{text}\nlog:\n{}", self.service.log.text());
            assert!(text.contains(&format!("2 workers of generation {generation} serve")), "{text}");
            answered_more(&load);
            let (status, text) = self.exec(&["reuse-run", "status"]);
            assert_eq!(status, Some(0), "{text}");
            assert!(text.contains("pid 1: serving, 2 of 2 slots ready"), "{text}");
        }
        let report = load.stop();
        println!("{report}");
        report.assert_nothing_failed();
        if atomic {
            report.assert_nothing_stale();
        }
        report.assert_generations(1..=4);
    }

    /// Stops the container by SIGTERM, as Docker and Kubernetes do. Asserts status 0 and that no process is left.
    #[track_caller]
    pub fn stop(mut self) {
        let processes = self.processes();
        assert!(processes.len() >= 2, "PID 1 and a worker: {processes:?}");
        let output = self.runtime(&["kill", &self.name, "TERM"]);
        assert!(output.status.success(), "{output:?}");
        assert_eq!(self.service.wait_end().code(), Some(0), "{}", self.service.log.text());
        for pid in processes {
            wait_until("no process is left", DEADLINE, || Process::read(pid).is_none());
        }
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        self.runtime(&["delete", "--force", &self.name]);
    }
}
