//! A running reuse-run and its commands: reload, status, scale and stop, the signals that do the same, the control
//! socket, and the PID file.
#![cfg_attr(clippy, deny(warnings))]

#[path = "../common/mod.rs"]
mod common;
mod find;
mod program;
mod protocol;
mod reload;
mod rollout;
mod scale;
mod status;
mod stop;
mod terminal;
mod usage;
