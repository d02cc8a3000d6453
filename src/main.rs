//! reuse-run: runs N copies of any unmodified server on one port and replaces them without losing a
//! request. See the README for what it promises, and each module's comment for what it owns.
#![cfg_attr(clippy, deny(warnings))]
// A panic ends the wrapper, and with it the workers.
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

#[cfg(not(target_os = "linux"))]
compile_error!("reuse-run needs Linux: it stands on seccomp user notification and SO_REUSEPORT programs");

mod address;
mod cli;
mod drain;
mod fleet;
mod ids;
mod intercept;
mod kernel;
mod lines;
mod operate;
mod output;
mod pool;
mod steering;
mod supervisor;
mod words;
mod worker;

use std::io::Write;
use std::process::ExitCode;

use cli::Invocation;
use log::error;

/// The exit status when the command line is wrong.
const MISUSE: u8 = 2;

fn main() -> ExitCode {
    output::log::start();
    match cli::parse(std::env::args_os().skip(1)) {
        Ok(Invocation::Print(text)) => {
            let _ = std::io::stdout().write_all(text.as_bytes()); // the reader may have seen enough
            ExitCode::SUCCESS
        }
        Ok(Invocation::Control(command)) => operate::client::run(command).into(),
        Ok(Invocation::Run(options)) => match supervisor::run(*options) {
            Ok(status) => status.into(),
            Err(error) => {
                error!("can't start: {error}");
                ExitCode::FAILURE
            }
        },
        Err(wrong) => {
            error!("{wrong}");
            MISUSE.into()
        }
    }
}
