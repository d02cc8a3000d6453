//! The programs that the tests run.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;

/// The binary under test, with the log level that it has by default.
pub fn reuse_run() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_reuse-run"));
    command.env_remove("RUST_LOG");
    command
}

/// `OPTIONS -- COMMAND` as arguments, the options of REUSE_RUN_TEST_OPTIONS before them.
pub fn arguments<S: AsRef<str>>(options: &str, command: &[S]) -> Vec<String> {
    let always = std::env::var("REUSE_RUN_TEST_OPTIONS").unwrap_or_default();
    let options = always.split_whitespace().chain(options.split_whitespace());
    options.chain(["--"]).chain(command.iter().map(AsRef::as_ref)).map(str::to_owned).collect()
}

/// The path of an example of this package, built beside the running test.
pub fn example(name: &str) -> String {
    let test = std::env::current_exe().expect("the path of the test");
    let built = test.parent().and_then(|deps| deps.parent()).expect("target/PROFILE/deps/TEST");
    let path = built.join("examples").join(name);
    assert!(path.exists(), "{} is missing: run `cargo build --examples` first", path.display());
    path.into_os_string().into_string().expect("a path in UTF-8")
}

/// The naive test server.
pub fn server() -> String {
    example("server")
}

/// The path of an app under tests/apps.
pub fn app(name: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/apps").join(name);
    assert!(path.exists(), "{} is missing", path.display());
    path.into_os_string().into_string().expect("a path in UTF-8")
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

/// The naive server as a command.
pub fn naive(addr: SocketAddr) -> Vec<String> {
    vec![server(), "--listen".to_owned(), addr.to_string()]
}

/// A Python program in a few lines, as a command.
pub fn inline(program: &str, rest: &[&str]) -> Vec<String> {
    ["python3", "-c", program].iter().chain(rest).map(|word| (*word).to_owned()).collect()
}
