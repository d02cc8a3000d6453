//! What people and other programs operate reuse-run by.

pub mod client;
pub mod control;
pub mod pidfile;
pub mod protocol;
pub mod signals;
pub mod status;
pub mod systemd;
