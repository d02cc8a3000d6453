//! What reuse-run writes to stdout and stderr: the log, and the workers' output.

pub mod labels;
pub mod log;
pub mod seldom;
pub mod sink;
