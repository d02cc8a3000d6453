//! Combines the figures of many runs and writes them to files.

use std::fs;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use crate::load::Report;
use crate::machine::Machine;
use crate::{Context, Options, Result};

/// Latencies of answered requests, in milliseconds.
#[derive(Clone, Copy, Serialize)]
pub struct Latencies {
    pub p50: f64,
    pub p99: f64,
    pub p999: f64,
    pub longest: f64,
}

impl Latencies {
    pub fn of(reports: &[Report]) -> Latencies {
        let mut all: Vec<Duration> =
            reports.iter().flat_map(|report| report.latencies.iter().copied()).collect();
        all.sort_unstable();
        let at = |part: f64| {
            let index = (all.len().saturating_sub(1) as f64 * part).round() as usize;
            all.get(index).map_or(0.0, |latency| latency.as_secs_f64() * 1e3)
        };
        Latencies { p50: at(0.5), p99: at(0.99), p999: at(0.999), longest: at(1.0) }
    }
}

/// The median of some figures; 0 if there are none.
pub fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    quartiles(values)[1]
}

/// The quartiles of some figures, the median among them.
pub fn quartiles(values: impl IntoIterator<Item = f64>) -> [f64; 3] {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1) as f64;
    [0.25, 0.5, 0.75].map(|part| {
        let place = last * part;
        let at = |place: f64| values.get(place as usize).copied().unwrap_or(0.0);
        at(place.floor()) + (at(place.ceil()) - at(place.floor())) * place.fract()
    })
}

/// A Markdown table; the first column is text, the others are figures.
pub fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let mut text = line(&header.iter().map(std::string::ToString::to_string).collect::<Vec<_>>());
    text += &format!("|---|{}\n", "--:|".repeat(header.len() - 1));
    rows.iter().for_each(|row| text += &line(row));
    text
}

/// Writes NAME.json and NAME.md, both with the machine, and prints the Markdown.
pub fn write(options: &Options, name: &str, data: &impl Serialize, markdown: &str) -> Result<()> {
    let machine = Machine::this(&options.binary);
    let text = |value: &Value| serde_json::to_string(value).context(name);
    // A line for each run, so that a diff shows what has changed.
    let data = match serde_json::to_value(data).context(name)? {
        Value::Array(runs) if runs.is_empty() => {
            // A misspelt name must not erase earlier results.
            let only = options.only.as_deref().unwrap_or_default();
            return Err(format!("{name}: nothing was measured: no part has '{only}' in its name (--only)"));
        }
        Value::Array(runs) => {
            format!("[\n{}\n]", runs.iter().map(text).collect::<Result<Vec<_>>>()?.join(",\n"))
        }
        other => text(&other)?,
    };
    let json = format!(
        "{{\n\"machine\": {},\n\"quick\": {},\n\"seed\": {},\n\"data\": {data}\n}}\n",
        serde_json::to_string(&machine).context(name)?,
        options.quick,
        options.seed,
    );
    let markdown =
        format!("{markdown}\n{machine}{}\n", if options.quick { ", shortened (--quick)" } else { "" });
    save(options, &format!("{name}.json"), &json)?;
    save(options, &format!("{name}.md"), &markdown)?;
    println!("{markdown}");
    Ok(())
}

fn save(options: &Options, file: &str, text: &str) -> Result<()> {
    let path = options.out.join(file);
    fs::write(&path, text).context(&path.display().to_string())
}
