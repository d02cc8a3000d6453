//! scripts/bench works. (Its figures need a quiet machine and much more time.)
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::fs;
use std::process::{Command, Stdio};

use common::{Folder, example, reuse_run, server, turn};
use serde_json::Value;

#[test]
fn the_bench_counts_failed_requests_in_a_reload_for_each_kind_of_client() {
    let _turn = turn();
    let (results, _) = (Folder::new(), server());
    let mut bench = Command::new(example("bench"));
    bench.args(["reload", "--quick", "--only", "naive Node app, reuse-run", "--out", &results.path("")]);
    bench.arg("--binary").arg(reuse_run().get_program());
    let output = bench.stdin(Stdio::null()).output().expect("run the bench");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let text = fs::read_to_string(results.path("reload.json")).expect("data");
    let data: Value = serde_json::from_str(&text).expect("JSON");
    let cells = data["data"].as_array().expect("cells");
    let clients: Vec<&str> = cells.iter().filter_map(|cell| cell["clients"].as_str()).collect();
    assert_eq!(clients, ["new connections", "keep-alive with think time", "keep-alive at full speed"]);
    assert!(cells.iter().all(|cell| cell["requests"].as_u64() > Some(100)), "{text}");
    assert_eq!(cells[0]["failed"], 0, "{text}");
    let table = fs::read_to_string(results.path("reload.md")).expect("table");
    assert!(table.contains("| reuse-run | 0 of "), "{table}");
}

#[test]
fn the_bench_keeps_its_results_when_only_matches_no_part() {
    let results = Folder::new();
    fs::write(results.path("balance.md"), "kept").expect("write");
    let mut bench = Command::new(example("bench"));
    bench.args(["balance", "--only", "no such part", "--out", &results.path("")]);
    bench.arg("--binary").arg(reuse_run().get_program());
    let output = bench.stdin(Stdio::null()).output().expect("run the bench");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && error.contains("no part has 'no such part' in its name"), "{error}");
    assert_eq!(fs::read_to_string(results.path("balance.md")).expect("read"), "kept");
}
