//! File systems that don't answer. Nothing that a worker does with one keeps the others waiting.
#![cfg_attr(clippy, deny(warnings))]

mod common;

use common::{DEADLINE, Folder, HungFileSystem, Service, app, assert_prompt, unlinking, wait_until};
use nix::sys::signal::Signal;

/// Slot 0 runs hung.py, the others unlinks.py.
fn workers(what: &str, folder: &Folder, file: &str) -> Vec<String> {
    let text = r#"if [ "$REUSE_RUN_SLOT" = 0 ]; then exec python3 "$0" "$1" "$2" "$3"; fi
        shift 3; exec "$@""#;
    let first = ["sh", "-c", text, &app("python/hung.py"), what, &folder.path(""), file];
    first.iter().map(|word| (*word).to_owned()).chain(unlinking(folder)).collect()
}

/// Waits until the worker of slot 1 is ready, which unlinks.
fn wait_until_slot_1_unlinks(folder: &Folder) {
    let path = folder.path("unlinks");
    wait_until("a worker that unlinks", DEADLINE, || std::path::Path::new(&path).exists());
}

#[track_caller]
fn stop(mut service: Service, mut hung: HungFileSystem) {
    service.signal(Signal::SIGTERM);
    service.wait_exit();
    hung.end(&service);
}

#[test]
fn a_call_whose_argument_lies_in_a_hung_file_system_keeps_no_other_worker_waiting() {
    for (what, file) in [
        ("bind", "file"),
        ("early-option", "file"),
        ("early-unlink", "file"),
        ("early-unlink-path", "folder/socket"),
        ("early-bind-path", "folder/socket"),
    ] {
        println!("{what}");
        let (hung, folder) = (HungFileSystem::new(), Folder::new());
        let service =
            Service::run("-n 2 --ready notify --stop-timeout 1s", &workers(what, &folder, &hung.path(file)));
        wait_until_slot_1_unlinks(&folder);
        service.wait_for_output("waits");
        hung.hang();
        folder.raise("go");
        service.wait_for_output("calls");
        assert_prompt(&service, &folder);
        assert_eq!(service.out.count_of("returns"), 0, "it didn't hang");
        stop(service, hung);
    }
}
