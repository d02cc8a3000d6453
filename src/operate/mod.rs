//! How users, systemd and other programs operate reuse-run: commands, signals, the PID file.

pub mod client;
pub mod control;
pub mod find;
mod peer;
pub mod pidfile;
pub mod protocol;
mod replies;
pub mod signals;
pub mod status;
pub mod systemd;
