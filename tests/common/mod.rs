//! What the tests, the tools and the bench share: a file for each noun.
//!
//! `service` is `reuse-run` under test, `program` what it runs, `load` and `client` are its clients, `command`
//! its commands; `process` reads /proc, `lines` collects output, `wait` waits for a condition.
// Each test is a crate of its own that uses only some of this.
#![allow(dead_code, unused_imports, unused_macros)]

mod address;
mod built;
mod client;
mod command;
mod flows;
mod folder;
mod hung;
mod lines;
pub mod load;
mod netns;
mod own_socket;
mod process;
mod program;
mod prompt;
mod service;
mod stranger;
mod terminal;
mod user;
mod wait;

pub use address::*;
pub use client::*;
pub use command::*;
pub use flows::*;
pub use folder::*;
pub use hung::*;
pub use lines::*;
pub use own_socket::*;
pub use process::*;
pub use program::*;
pub use prompt::*;
pub use service::*;
pub use stranger::*;
pub use terminal::*;
pub use user::*;
pub use wait::*;
