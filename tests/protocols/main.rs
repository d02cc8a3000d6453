//! What is under way is finished: each protocol, at a reload and at a stop, with servers that have no signal handler and real
//! clients. A table of rows; [`row`] says what happens to each.
#![cfg_attr(clippy, deny(warnings))]

mod clients;
#[path = "../common/mod.rs"]
mod common;
mod queued;
mod row;
mod servers;

use clients::Client::{self, Curl, Go, Grpc, Node};
use row::{Row, assert_nothing_fails};
use servers::Server;

/// Row by row: the name, the server, its clients.
const fn row(name: &'static str, server: Server, client: Client) -> Row {
    Row { name, server, client, options: "", answers: "" }
}

/// A row whose workers pause while they answer, or answer several requests of a connection at a time.
const fn pausing(name: &'static str, server: Server, client: Client) -> Row {
    Row { options: "--idle-after 2s", ..row(name, server, client) }
}

#[test]
fn plain_http_loses_nothing() {
    let node = Server::Node("http");
    assert_nothing_fails(&[
        row("http, Node", node, Node("http")),
        row("chunked upload, Node", node, Node("upload")),
        row("server-sent events, Node", node, Node("events")),
        row("http, Node, curl", node, Curl { flags: "--http1.1", body: 0 }),
    ]);
}

#[test]
fn a_body_that_waits_for_100_continue_is_not_lost() {
    assert_nothing_fails(&[
        row("100-continue, Node", Server::Node("http"), Node("expect")),
        row("100-continue, Node, curl", Server::Node("http"), Curl { flags: "--http1.1", body: 1000 }),
        row("100-continue over TLS, Go", Server::Go, Go("expect")),
    ]);
}

#[test]
fn messages_of_other_protocols_are_not_lost() {
    assert_nothing_fails(&[
        row("WebSocket, Node", Server::Node("websocket"), Node("websocket")),
        row("lines over TCP, Node", Server::Node("lines"), Node("lines")),
    ]);
}

#[test]
fn https_loses_nothing_without_resumption() {
    let node = Server::Node("https");
    assert_nothing_fails(&[
        row("TLS 1.2, Node", node, Node("tls1.2")),
        row("TLS 1.3, Node", node, Node("tls1.3")),
        row("TLS 1.2, Python, curl", Server::Python("server.py"), Curl { flags: "--tls-max 1.2", body: 0 }),
        row("TLS 1.3, Python, curl", Server::Python("server.py"), Curl { flags: "--tlsv1.3", body: 0 }),
        row("TLS 1.3, Go", Server::Go, Go("http1")),
    ]);
}

#[test]
fn https_loses_nothing_with_resumption() {
    let resumed = |name, server, client| Row { answers: "resumed", ..row(name, server, client) };
    assert_nothing_fails(&[
        resumed("TLS 1.2 resumed, Node", Server::Node("https"), Node("tls1.2-resumed")),
        resumed("TLS 1.3 resumed, Node", Server::Node("https"), Node("tls1.3-resumed")),
        resumed("TLS 1.3 resumed, Go", Server::Go, Go("http1-resumed")),
    ]);
}

#[test]
fn http_2_loses_nothing() {
    let http_2 = |name, client| Row { answers: "HTTP/2.0", ..row(name, Server::Go, client) };
    assert_nothing_fails(&[
        row("h2, Node", Server::Node("h2"), Node("h2")),
        row("h2, Node, curl", Server::Node("h2"), Curl { flags: "--http2", body: 0 }),
        row("h2c, Node", Server::Node("h2c"), Node("h2c")),
        row("h2c, Node, curl", Server::Node("h2c"), Curl { flags: "--http2-prior-knowledge", body: 0 }),
        http_2("h2, Go", Go("h2")),
    ]);
}

#[test]
fn with_idle_after_streams_and_multiplexed_requests_lose_nothing() {
    let (python, node) = (Server::Python("grpc_server.py"), Server::Node("grpc"));
    assert_nothing_fails(&[
        pausing("six streams on each h2 connection, Node", Server::Node("h2"), Node("h2-kept")),
        pausing("events over h2, Go", Server::Go, Go("events")),
        pausing("gRPC stream, Python", python, Grpc("stream")),
        pausing("gRPC stream, Node", node, Grpc("stream")),
        pausing("six calls on each gRPC channel, Python", python, Grpc("kept")),
        pausing("six calls on each gRPC channel, Node", node, Grpc("kept")),
    ]);
}

#[test]
fn grpc_loses_nothing() {
    let (python, node) = (Server::Python("grpc_server.py"), Server::Node("grpc"));
    assert_nothing_fails(&[
        row("gRPC unary, Python", python, Grpc("unary")),
        row("gRPC unary, Node", node, Grpc("unary")),
    ]);
}
