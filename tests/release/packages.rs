//! What scripts/release makes is installed, used and removed.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::common::{Folder, needs_other_users};
use crate::oci::{Bundle, Container, Identity, Runtime, static_binary};
use crate::{here, run};

const VERSION: &str = env!("CARGO_PKG_VERSION");
const SERVER: &str = "/server --listen 0.0.0.0:8080";

/// A checkout of what a release is made from, as a commit that is the same each time.
fn checkout() -> Folder {
    let folder = Folder::new();
    let parts =
        "Cargo.toml Cargo.lock README.md CHANGELOG.md LICENSE-MIT LICENSE-APACHE docs src scripts tests";
    let script = format!("tar -c --exclude=node_modules {parts} | tar -x -C {}", folder.path(""));
    run(Command::new("bash").args(["-euo", "pipefail", "-c", &script]).current_dir(here("")));
    git(&folder, "init --quiet");
    git(&folder, "add --all");
    git(&folder, "commit --quiet --message Release");
    folder
}

fn git(folder: &Folder, arguments: &str) {
    let mut git = Command::new("git");
    git.args(arguments.split_whitespace()).current_dir(&folder.0);
    for name in ["GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"] {
        git.env(name, "/dev/null");
    }
    for who in ["AUTHOR", "COMMITTER"] {
        git.env(format!("GIT_{who}_NAME"), "Somebody").env(format!("GIT_{who}_EMAIL"), "somebody@localhost");
        git.env(format!("GIT_{who}_DATE"), "2026-01-01T00:00:00Z");
    }
    run(&mut git);
}

/// `scripts/release` of a checkout, with the static binary that is built already.
fn release(checkout: &Folder, output: &Path) -> Command {
    let mut release = Command::new(checkout.0.join("scripts/release"));
    release.arg("--binary").arg(static_binary()).arg("--output").arg(output);
    release
}

/// The folder of packages of this version.
fn packages() -> &'static Path {
    static PACKAGES: OnceLock<()> = OnceLock::new();
    let folder = Path::new(concat!(env!("CARGO_TARGET_TMPDIR"), "/packages"));
    PACKAGES.get_or_init(|| {
        let checkout = checkout();
        git(&checkout, &format!("tag v{VERSION}"));
        run(&mut release(&checkout, folder));
    });
    folder
}

/// The only package whose name ends so.
#[track_caller]
pub fn package(end: &str) -> String {
    let files = fs::read_dir(packages()).expect("packages").map(|entry| entry.expect("a file").path());
    let files = files.map(|path| path.into_os_string().into_string().expect("UTF-8"));
    let files: Vec<String> = files.filter(|path| path.ends_with(end)).collect();
    assert_eq!(files.len(), 1, "{end}: {files:?}");
    files[0].clone()
}

#[track_caller]
fn assert_is_the_version(program: &str) {
    assert_eq!(run(Command::new(program).arg("--version")), format!("reuse-run {VERSION}\n"));
}

/// Starts a container with a command that runs two servers, and asserts that `reuse-run status` finds them serving.
#[track_caller]
fn start_serving(mut bundle: Bundle, command: &str) -> Container {
    let words: Vec<&str> = command.split_whitespace().collect();
    bundle.config["process"]["args"] = json!(words);
    let container = bundle.start_as_configured(Runtime::Runc);
    container.wait_until_ready();
    let (status, text) = container.exec(&["reuse-run", "status"]);
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains("serving, 2 of 2 slots ready on 0.0.0.0:8080"), "{text}");
    container
}

#[test]
fn a_release_needs_a_clean_checkout_of_the_tag() {
    let (checkout, output) = (checkout(), Folder::new());
    let refused = |reason: &str| {
        let release = release(&checkout, &output.0).output().expect("run scripts/release");
        let text = String::from_utf8_lossy(&release.stderr).into_owned();
        assert!(!release.status.success() && text.contains(reason), "{reason:?} is not in {text}");
    };
    refused(&format!("HEAD has no tag v{VERSION} (see --untagged)"));
    checkout.raise("new");
    refused("the checkout has changes that are not in HEAD:\n?? new");
    checkout.lower("new");
    output.raise("mine");
    refused("holds something else than packages: mine");
    // Also beside the sums of something else.
    fs::write(output.path("SHA256SUMS"), "0  image.iso\n").expect("write sums");
    refused("holds something else than packages: mine");
    output.lower("mine");
    output.raise("image.iso");
    git(&checkout, &format!("tag v{VERSION}"));
    let rustc = Folder::new();
    // It has no other target.
    let text =
        "#!/bin/sh\nPATH=${PATH#*:}\n[ \"$*\" = '--print sysroot' ] && echo /nowhere || exec rustc \"$@\"\n";
    rustc.write_with("rustc", text, 0o755);
    let path = format!("{}:{}", rustc.0.display(), std::env::var("PATH").expect("PATH"));
    let incomplete = Command::new(checkout.0.join("scripts/release")).env("PATH", path).output();
    let incomplete = incomplete.expect("run scripts/release");
    let text = String::from_utf8_lossy(&incomplete.stderr).into_owned();
    assert!(!incomplete.status.success() && text.contains("missing `rustup target add "), "{text}");
    run(release(&checkout, &output.0).arg("--untagged"));
    assert!(!output.0.join("image.iso").exists(), "what the sums name is replaced");
    let notes = |path: String| fs::read_to_string(path).expect("the notes");
    let changelog = notes(checkout.path("CHANGELOG.md"));
    let (_, unreleased) = changelog.split_once("## [Unreleased]\n").expect("a part");
    let (unreleased, released) = unreleased.split_once("\n## [").expect("the next part");
    assert!(notes(output.path("NOTES.md")).ends_with(&format!("\n\n{}\n", unreleased.trim())));
    let (_, released) = released.split_once("\n### ").expect("its text");
    assert!(notes(package("/NOTES.md")).ends_with(&format!("\n\n### {}\n", released.trim())));
}

#[test]
fn two_checkouts_give_the_same_files_whoever_makes_them() {
    let checkout = checkout();
    git(&checkout, &format!("tag v{VERSION}"));
    let output = Folder::new();
    let script = r#"umask 077; exec "$0" "$@""#;
    let mut other = Command::new("sh");
    let release = release(&checkout, &output.0);
    other.args(["-c", script]).arg(release.get_program()).args(release.get_args());
    other.envs([("TZ", "Asia/Tokyo"), ("LC_ALL", "C"), ("USER", "other"), ("PYTHONHASHSEED", "7")]);
    run(&mut other);
    let sums = |folder: &Path| fs::read_to_string(folder.join("SHA256SUMS")).expect("sums");
    assert_eq!(sums(&output.0), sums(packages()));
    let checked = run(Command::new("sha256sum").args(["--check", "SHA256SUMS"]).current_dir(packages()));
    let files = fs::read_dir(packages()).expect("packages").count();
    assert_eq!(checked.lines().filter(|line| line.ends_with(": OK")).count(), files - 1, "{checked}");
}

#[test]
fn the_binary_names_no_folder_of_the_machine_that_has_built_it() {
    let binary = fs::read(static_binary()).expect("the binary");
    let home = std::env::var("HOME").expect("HOME");
    for folder in [env!("CARGO_MANIFEST_DIR"), &format!("{home}/.cargo")] {
        assert!(!binary.windows(folder.len()).any(|bytes| bytes == folder.as_bytes()), "{folder}");
    }
}

#[test]
fn the_archive_holds_the_binary_its_licences_man_pages_and_completions() {
    let folder = Folder::new();
    run(Command::new("tar").args(["-xzf", &package(".tar.gz"), "-C", &folder.path("")]));
    let inside = |path: &str| folder.path(&format!("reuse-run-{VERSION}/{path}"));
    assert_is_the_version(&inside("reuse-run"));
    for file in [
        "README.md",
        "CHANGELOG.md",
        "LICENSE-MIT",
        "LICENSE-APACHE",
        "docs/limits.md",
        "man/man1/reuse-run-reload.1",
    ] {
        assert!(Path::new(&inside(file)).exists(), "no {file}");
    }
    assert_eq!(fs::read_dir(inside("completions")).expect("completions").count(), 3);
}

#[test]
fn the_debian_package_is_installed_used_and_removed() {
    needs_other_users!();
    let bundle = Bundle::empty(Identity::Root);
    fs::remove_file(bundle.root("reuse-run")).expect("leave only the package's");
    fs::create_dir_all(bundle.root("var/lib/dpkg/updates")).expect("make a folder");
    fs::write(bundle.root("var/lib/dpkg/status"), "").expect("make a file");
    let root = bundle.folder.0.join("root");
    let dpkg = |arguments: &[&str]| {
        let mut dpkg = Command::new("dpkg");
        dpkg.arg(format!("--root={}", root.display())).arg("--force-not-root").args(arguments);
        run(&mut dpkg)
    };
    dpkg(&["--install", &package(".deb")]);
    let files = [
        "usr/bin/reuse-run",
        "usr/lib/systemd/system/reuse-run@.service",
        "usr/share/man/man1/reuse-run.1.gz",
        "usr/share/man/man1/reuse-run-stop.1.gz",
        "usr/share/bash-completion/completions/reuse-run",
        "usr/share/zsh/vendor-completions/_reuse-run",
        "usr/share/fish/vendor_completions.d/reuse-run.fish",
        "usr/share/doc/reuse-run/copyright",
        "usr/share/doc/reuse-run/changelog.gz",
        "usr/share/doc/reuse-run/docs/limits.md.gz",
        "usr/share/doc/reuse-run/THIRD-PARTY-LICENSES.gz",
    ];
    let list = dpkg(&["--listfiles", "reuse-run"]);
    for file in files {
        assert!(root.join(file).exists() && list.contains(&format!("\n/{file}\n")), "no {file}: {list}");
    }
    assert_eq!(dpkg(&["--verify", "reuse-run"]), "");
    let page = run(Command::new("mandoc").args(["-T", "ascii"]).arg(root.join(files[2])));
    assert!(page.starts_with("REUSE-RUN(1)"), "{page}");
    let unit = fs::read_to_string(root.join(files[1])).expect("the unit");
    let docs = fs::read_to_string(here("docs/systemd.md")).expect("the page");
    let (_, example) = docs.split_once("# /etc/reuse-run/app.env\n").expect("an example");
    for line in example.lines().take_while(|line| *line != "```") {
        assert!(unit.contains(&format!("#     {line}\n")), "{line} is not in {unit}");
    }
    let container = start_serving(bundle, &format!("/usr/bin/reuse-run -n 2 -- {SERVER}"));
    dpkg(&["--remove", "reuse-run"]);
    for file in files {
        assert!(!root.join(file).exists(), "{file} is left");
    }
    container.stop();
}

#[test]
fn the_npm_package_is_installed_and_found_by_npx() {
    let folder = Folder::new();
    let npm = |program: &str, arguments: &[&str]| {
        let mut npm = Command::new(program);
        npm.args(arguments).current_dir(&folder.0).env("npm_config_cache", folder.path("cache"));
        run(npm.env("npm_config_offline", "true").env("npm_config_update_notifier", "false"))
    };
    npm("npm", &["install", "--no-audit", "--no-fund", &package(".tgz")]);
    assert_eq!(npm("npx", &["reuse-run", "--version"]), format!("reuse-run {VERSION}\n"));
    let script = r#"node_modules/.bin/reuse-run --ready 0s --stop-signal TERM -- sleep 1000 2>log &
        until grep -q 'generation 1 is ready' log; do sleep 0.05; done
        cat /proc/$!/comm; kill $!; wait $!"#;
    // In a PID namespace, so that nothing is left of it.
    let alone = ["60", "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script];
    let name = npm("timeout", &alone);
    assert_eq!(name, "reuse-run\n", "signals reach reuse-run itself, and it ends with 0");
    npm("npm", &["uninstall", "--no-audit", "--no-fund", "reuse-run"]);
    assert!(!folder.0.join("node_modules/.bin/reuse-run").exists());
}

#[test]
fn the_wheel_is_installed_by_pip_and_removed() {
    let folder = Folder::new();
    run(Command::new("python3").args(["-m", "venv", "--without-pip", &folder.path("venv")]));
    let python = folder.path("venv/bin/python3");
    let pip = |arguments: &[&str]| {
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "--disable-pip-version-check", "--python", &python]).args(arguments);
        run(&mut pip)
    };
    pip(&["install", "--no-index", &package(".whl")]);
    assert_is_the_version(&folder.path("venv/bin/reuse-run"));
    pip(&["check"]);
    pip(&["uninstall", "--yes", "reuse-run"]);
    assert!(!folder.0.join("venv/bin/reuse-run").exists());
}

#[test]
fn the_oci_image_runs_in_runc() {
    needs_other_users!();
    let folder = Folder::new();
    run(Command::new("tar").args(["-xf", &package("-oci.tar"), "-C", &folder.path("")]));
    let parsed = |path: String| -> Value {
        serde_json::from_str(&fs::read_to_string(path).expect("a file")).expect("JSON")
    };
    // The file that a descriptor names, after a check of what it promises.
    let blob = |descriptor: &Value| {
        let (_, digest) = descriptor["digest"].as_str().expect("a digest").split_once(':').expect("a kind");
        let path = folder.path(&format!("blobs/sha256/{digest}"));
        assert!(run(Command::new("sha256sum").arg(&path)).starts_with(digest), "{path}");
        assert_eq!(descriptor["size"].as_u64(), fs::metadata(&path).ok().map(|file| file.len()), "{path}");
        path
    };
    run(Command::new("skopeo").args([
        "copy",
        "--all",
        &format!("oci-archive:{}", package("-oci.tar")),
        &format!("dir:{}", folder.path("copied")),
    ]));
    let index = parsed(blob(&parsed(folder.path("index.json"))["manifests"][0]));
    assert_eq!(index["manifests"][0]["platform"]["os"], "linux");
    let manifest = parsed(blob(&index["manifests"][0]));
    let config = parsed(blob(&manifest["config"]));
    let entrypoint = config["config"]["Entrypoint"][0].as_str().expect("an entrypoint");

    let mut bundle = Bundle::empty(Identity::Bare);
    bundle.config["process"]["env"] = config["config"]["Env"].clone();
    fs::remove_file(bundle.root("reuse-run")).expect("leave only the image's");
    let layer = blob(&manifest["layers"][0]);
    run(Command::new("tar").args(["-xzf", &layer, "-C"]).arg(bundle.root("")));
    start_serving(bundle, &format!("{entrypoint} -n 2 -- {SERVER}")).stop();
}

#[test]
fn the_list_of_parts_names_what_the_binary_is_built_from() {
    let list: Value =
        serde_json::from_str(&fs::read_to_string(package(".cdx.json")).expect("a list")).expect("JSON");
    let names = list["components"].as_array().expect("components").iter().map(|part| {
        assert_eq!(part["hashes"][0]["alg"], "SHA-256", "{part}");
        assert!(part["licenses"][0]["expression"].is_string(), "{part}");
        format!("{} v{}", part["name"].as_str().expect("a name"), part["version"].as_str().expect("one"))
    });
    let names: BTreeSet<String> = names.collect();
    let mut tree = Command::new("cargo");
    tree.args(["tree", "--locked", "--edges=normal,no-proc-macro", "--prefix=none"]);
    let tree = run(tree.current_dir(here("")));
    let crates = tree.lines().skip(1).map(|line| line.split(" (").next().expect("a crate").to_owned());
    let crates: BTreeSet<String> = crates.filter(|it| !it.is_empty()).collect();
    assert_eq!(names, crates);
    let folder = Folder::new();
    run(Command::new("tar").args(["-xzf", &package(".tar.gz"), "-C", &folder.path("")]));
    let licences = folder.path(&format!("reuse-run-{VERSION}/THIRD-PARTY-LICENSES"));
    let licences = fs::read_to_string(licences).expect("licences");
    assert!(licences.contains("Redistribution and use in source and binary forms"), "argh's");
    for name in crates {
        assert!(licences.contains(&format!("\n{}: ", name.replace(" v", " "))), "{name}");
    }
    assert!(!licences.contains("no file with the text"), "{licences}");
}
