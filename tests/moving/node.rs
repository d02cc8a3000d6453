//! docs/node-cluster.md and docs/pm2.md.

use std::fs;

use crate::common::{Service, get, own_network, reload_under_loads};
use crate::{
    WORKERS, app, every_command_loses_no_request, light, line, local, reload_loses_nothing, row, spans, start,
};

const CLUSTER: &str = "docs/node-cluster.md";
const PM2: &str = "docs/pm2.md";
const PORT: u16 = 3000;
const APP: &str = "tests/readme/app.js";

#[test]
fn node_loses_no_request_by_any_command_of_the_page_about_its_cluster() {
    every_command_loses_no_request(CLUSTER, " -- node app.js", &app("", APP), PORT);
}

#[test]
fn node_loses_no_request_by_any_command_of_the_page_about_pm2() {
    every_command_loses_no_request(PM2, " -- node app.js", &app("", APP), PORT);
}

/// Reloads under load at a port of each worker. Nothing fails there, and each is answered by its slot.
#[track_caller]
fn assert_ports_of_each_worker(service: &Service, first: u16) {
    let loads = [0, 1].map(|slot| light(local(first + slot)));
    for (slot, report) in reload_under_loads(service, loads, 1).into_iter().enumerate() {
        report.assert_generations([1, 2]);
        assert_eq!(report.counts.slots.keys().collect::<Vec<_>>(), [&(slot as u32)], "{report}");
    }
}

#[test]
fn a_worker_of_node_is_a_primary_gets_no_message_and_may_have_a_port_of_its_own() {
    own_network();
    let row = row(CLUSTER, "an HTTP port of each worker");
    let port = spans(&row[1]).next().expect("an expression");
    let folder = app(
        &format!(
            "const cluster = require('node:cluster');\n\
         console.log(`isPrimary=${{cluster.isPrimary}}`);\n\
         for (const event of ['message', 'disconnect']) process.on(event, () => console.log('came:', event));\n\
         setInterval(() => process.send({{ from: process.pid }}), 20);\n\
         require('http').createServer((req, res) => {{\n\
         \x20 const {{ REUSE_RUN_GENERATION: generation, REUSE_RUN_SLOT: slot }} = process.env;\n\
         \x20 res.end(`pid=${{process.pid}} generation=${{generation}} slot=${{slot}}\\n`);\n\
         }}).listen({port});"
        ),
        APP,
    );
    let mut service = start(&line(CLUSTER, " -- node app.js"), &folder);
    assert_ports_of_each_worker(&service, 9100);
    assert_eq!(get(local(PORT)).generation, Some(2));
    service.stop();
    assert_eq!(service.out.count_of("isPrimary=true"), 4, "{}", service.out.text());
    assert_eq!(service.out.count_of("came: "), 0, "{}", service.out.text());
}

#[test]
fn a_script_that_forks_is_one_worker_and_loses_no_request() {
    own_network();
    let folder = app("process.env.PORT = 3000;", "tests/servers/node-cluster/naive.js");
    fs::rename(folder.path("naive.js"), folder.path("cluster.js")).expect("rename the script");
    let mut service = start(&line(CLUSTER, " -- node cluster.js"), &folder);
    let worker = service.workers();
    assert_eq!(worker.len(), 1);
    reload_loses_nothing(&service, local(PORT));
    let answer = get(local(PORT));
    assert_eq!(answer.generation, Some(2));
    assert_ne!(answer.pid, service.workers().first().copied(), "a child answers");
    service.stop();
}

#[test]
fn a_port_that_grows_by_the_number_of_the_worker_loses_no_request() {
    own_network();
    let folder = app("", APP);
    let text = fs::read_to_string(folder.path("app.js")).expect("the app");
    folder.write("app.js", &text.replace("listen(3000)", "listen(process.env.PORT)"));
    let line = line(PM2, "REUSE_RUN_SLOT");
    assert!(line.contains(WORKERS));
    let mut service = start(&line, &folder);
    assert_ports_of_each_worker(&service, PORT);
    service.stop();
}
