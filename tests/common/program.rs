//! The programs that the tests run.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;

use super::built;

/// `reuse-run`, with its default log level.
pub fn reuse_run() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_reuse-run"));
    command.env_remove("REUSE_RUN_LOG");
    command
}

/// `OPTIONS -- COMMAND` as arguments.
pub fn arguments<S: AsRef<str>>(options: &str, command: &[S]) -> Vec<String> {
    options
        .split_whitespace()
        .chain(["--"])
        .chain(command.iter().map(AsRef::as_ref))
        .map(str::to_owned)
        .collect()
}

/// `reuse-run OPTIONS -- COMMAND`.
pub fn reuse_run_with<S: AsRef<str>>(options: &str, command: &[S]) -> Command {
    let mut reuse_run = reuse_run();
    reuse_run.args(arguments(options, command));
    reuse_run
}

/// `PREFIX reuse-run OPTIONS -- COMMAND`: another program that becomes reuse-run or starts it.
pub fn behind<S: AsRef<str>>(prefix: &[&str], options: &str, command: &[S]) -> Command {
    let mut starter = Command::new(prefix[0]);
    starter.args(&prefix[1..]).arg(reuse_run().get_program()).args(arguments(options, command));
    starter.env_remove("REUSE_RUN_LOG");
    starter
}

/// `reuse-run OPTIONS -- COMMAND` started by a shell script that ends with `exec "$0" "$@"`.
pub fn behind_shell<S: AsRef<str>>(text: &str, options: &str, command: &[S]) -> Command {
    behind(&["sh", "-c", text], options, command)
}

/// `reuse-run OPTIONS -- COMMAND` with redirections as in a shell.
pub fn redirected<S: AsRef<str>>(redirections: &str, options: &str, command: &[S]) -> Command {
    behind_shell(&format!(r#"exec "$0" "$@" {redirections}"#), options, command)
}

/// The path of an example of this package.
pub fn example(name: &str) -> String {
    let path = built::program(&format!("examples/{name}"));
    let path = path.unwrap_or_else(|error| panic!("{error} (see scripts/test)"));
    path.into_os_string().into_string().expect("a path in UTF-8")
}

/// The path of the test server.
pub fn server() -> String {
    example("server")
}

/// The path of an app under tests/apps.
pub fn app(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/apps").join(name);
    assert!(path.exists(), "{} is missing", path.display());
    path.into_os_string().into_string().expect("a path in UTF-8")
}

/// The file of the Node that tests use (see scripts/needs.sh).
pub fn node() -> String {
    let path = std::env::var_os("PATH").expect("PATH");
    let mut files = std::env::split_paths(&path).filter_map(|folder| folder.join("node").canonicalize().ok());
    files.next().and_then(|file| file.into_os_string().into_string().ok()).expect("node (see scripts/test)")
}

/// The path of an app that needs the packages of tests/apps/package-lock.json.
pub fn node_app(name: &str) -> String {
    let modules = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/apps/node_modules");
    assert!(
        modules.exists(),
        "{} is missing: run scripts/test, or `npm ci` in tests/apps",
        modules.display()
    );
    app(name)
}

/// The test server as a command.
pub fn naive(addr: SocketAddr) -> Vec<String> {
    naive_with(addr, &[])
}

/// The test server with more options.
pub fn naive_with(addr: SocketAddr, more: &[&str]) -> Vec<String> {
    words(&[&[&server(), "--listen", &addr.to_string()], more].concat())
}

/// A shell script as a command: `$0` is the test server, `$1` the address to listen on.
pub fn script(text: &str, addr: SocketAddr) -> Vec<String> {
    words(&["sh", "-c", text, &server(), &addr.to_string()])
}

/// An app in Python as a command.
pub fn python(name: &str, more: &[&str]) -> Vec<String> {
    words(&[&["python3", &app(&format!("python/{name}"))], more].concat())
}

/// The text of a Python program as a command.
pub fn inline(program: &str, more: &[&str]) -> Vec<String> {
    words(&[&["python3", "-c", program], more].concat())
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// The folder of the packages in tests/apps/python/requirements.txt, one of which is `package`.
pub fn python_packages(package: &str) -> PathBuf {
    let packages = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/python");
    let exists = packages.join(package).exists();
    assert!(exists, "{package} is missing in {}: run scripts/test", packages.display());
    packages
}
