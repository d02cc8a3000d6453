//! Where cargo has put the programs of this package.

use std::path::{Path, PathBuf};

/// The path of a program or, as `examples/NAME`, of an example that was built together with this program. Tests are in
/// target/PROFILE/deps, examples in target/PROFILE/examples.
pub fn program(name: &str) -> Result<PathBuf, String> {
    let own = std::env::current_exe().map_err(|error| format!("own path: {error}"))?;
    let path = own.ancestors().nth(2).unwrap_or(Path::new(".")).join(name);
    if path.exists() { Ok(path) } else { Err(format!("{} is missing: build it first", path.display())) }
}
