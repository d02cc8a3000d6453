//! What the tests, the tools and the bench share, in a file for each kind of thing.
// Each test file is a crate of its own and uses a part of it.
#![allow(dead_code, unused_imports)]

mod address;
mod client;
mod folder;
mod lines;
pub mod load;
mod netns;
mod process;
mod program;
mod service;
mod wait;

pub use address::*;
pub use client::*;
pub use folder::*;
pub use lines::*;
pub use process::*;
pub use program::*;
pub use service::*;
pub use wait::*;
