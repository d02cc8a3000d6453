//! Runs the micro-benchmarks, and computes how their cost grows.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use serde::Serialize;
use serde_json::Value;

use crate::report::{self, table};
use crate::{Context, Options, Result};

#[derive(Serialize)]
struct Data {
    /// Nanoseconds, by benchmark and by number of workers.
    ns: BTreeMap<String, BTreeMap<u32, f64>>,
}

pub fn run(options: &Options) -> Result<()> {
    eprintln!("micro: cargo bench");
    let home = options.work.join("criterion");
    let seconds = if options.quick { ["0.2", "0.5"] } else { ["1", "5"] };
    let output = Command::new("cargo")
        .args(["bench", "--quiet", "--locked", "--bench", "pure", "--", "--noplot"])
        .args(["--warm-up-time", seconds[0], "--measurement-time", seconds[1]])
        .env("CRITERION_HOME", &home)
        .output()
        .context("cargo bench")?;
    if !output.status.success() {
        return Err(format!("cargo bench: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)));
    }
    let mut data = Data { ns: BTreeMap::new() };
    for (name, sizes) in [
        ("steering program", &[10, 100, 1000][..]),
        ("attach a steering program", &[10, 100, 1000]),
        ("look at accept queues", &[10, 100, 1000]),
        ("decode a notification", &[1]),
        ("reload in the state machine", &[10, 100, 1000]),
    ] {
        for n in sizes {
            let folder = if sizes.len() > 1 { home.join(name).join(n.to_string()) } else { home.join(name) };
            let file = folder.join("new/estimates.json");
            let text = fs::read_to_string(&file).context(&file.display().to_string())?;
            let estimates: Value = serde_json::from_str(&text).context(name)?;
            let ns = estimates["median"]["point_estimate"].as_f64().ok_or("criterion's median")?;
            data.ns.entry(name.to_owned()).or_default().insert(*n, ns);
        }
    }
    report::write(options, "micro", &data, &markdown(&data))
}

fn markdown(data: &Data) -> String {
    let rows = data.ns.iter().map(|(name, sizes)| {
        let shown = |n: u32| sizes.get(&n).map_or(String::new(), |ns| format!("{:.2}", ns / 1e3));
        // The exponent of n: 1 is linear, 2 quadratic.
        let growth = match (sizes.get(&100), sizes.get(&1000)) {
            (Some(hundred), Some(thousand)) => format!("{:.2}", (thousand / hundred).log10()),
            _ => String::new(),
        };
        let one = sizes.get(&1).map_or(String::new(), |ns| format!("{:.4}", ns / 1e3));
        vec![name.clone(), one, shown(10), shown(100), shown(1000), growth]
    });
    let header = ["µs", "once", "for 10", "for 100", "for 1,000", "exponent of n"];
    table(&header, &rows.collect::<Vec<_>>())
}
