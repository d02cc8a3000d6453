//! scripts/bench works. (Its figures need a quiet machine and much more time.)
#![cfg_attr(clippy, deny(warnings))]

mod common;

use std::fs;
use std::process::{Command, Stdio};

use common::{Folder, example, reuse_run, server, turn};
use serde_json::Value;

/// The cells and the table of `bench reload` with `--only`.
fn reload(only: &str) -> (Vec<Value>, String) {
    let (results, _) = (Folder::new(), server());
    let mut bench = Command::new(example("bench"));
    bench.args(["reload", "--quick", "--only", only, "--out", &results.path("")]);
    bench.arg("--binary").arg(reuse_run().get_program());
    let output = bench.stdin(Stdio::null()).output().expect("run the bench");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = fs::read_to_string(results.path("reload.json")).expect("data");
    let data: Value = serde_json::from_str(&text).expect("JSON");
    let table = fs::read_to_string(results.path("reload.md")).expect("table");
    (data["data"].as_array().expect("cells").clone(), table)
}

fn columns(cells: &[Value]) -> Vec<&str> {
    cells.iter().filter_map(|cell| cell["column"].as_str()).collect()
}

#[test]
fn the_bench_counts_failed_requests_in_a_reload_for_each_kind_of_client() {
    let _turn = turn();
    let (cells, table) = reload("naive Node app, reuse-run");
    let clients = ["new connections", "keep-alive with think time", "keep-alive at full speed"];
    assert_eq!(columns(&cells), clients);
    assert!(cells.iter().all(|cell| cell["requests"].as_u64() > Some(100)), "{cells:?}");
    assert_eq!(cells[0]["failed"], 0, "{cells:?}");
    let most = &cells[2]["most_of_a_client"];
    assert!(most.as_u64() <= cells[2]["failed"].as_u64() && most.is_u64(), "{cells:?}");
    assert!(table.contains("| reuse-run | 0 of "), "{table}");
}

#[test]
fn the_bench_counts_failed_requests_over_https_in_a_reload_and_at_a_stop() {
    let _turn = turn();
    let (cells, table) = reload("https, reuse-run");
    assert_eq!(columns(&cells), ["https"; 2]);
    let [reload, stop] = &*cells else { panic!("{cells:?}") };
    assert!(reload["requests"].as_u64() > Some(16) && reload["failed"] == 0, "{reload}");
    assert!(stop["requests"] == 16 && stop["failed"] == 0, "{stop}");
    assert!(stop["seconds"].as_f64() > Some(0.5), "the requests were in flight: {stop}");
    assert!(table.contains("| reuse-run | 0 of 16 | "), "{table}");
}

#[test]
fn the_bench_counts_requests_that_a_stop_cuts() {
    let _turn = turn();
    let (cells, table) = reload("stop of a naive Node app, h2, the bare program");
    assert!(cells.len() == 1 && cells[0]["requests"] == 16 && cells[0]["failed"] == 16, "{cells:?}");
    assert!(table.contains("| the bare program | **16.0** of 16 | "), "{table}");
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
