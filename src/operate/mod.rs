//! How users, systemd and other programs operate reuse-run: commands, signals, the PID file.

pub mod client;
pub mod control;
pub mod pidfile;
pub mod protocol;
pub mod signals;
pub mod status;
pub mod systemd;
