//! Answers of Redis, as its documentation of the protocol (RESP2) has them, parsed strictly: an array of strings.

use super::http::{Parsed, shown};

/// What follows on the last command of a connection.
const GOODBYE: &[u8] = b"+OK\r\n";

/// An inline command. The server closes the connection after the last one.
pub fn request(command: &str, last: bool) -> String {
    format!("{command}\r\n{}", if last { "QUIT\r\n" } else { "" })
}

/// Parses an answer. Its body is the strings, a line each.
pub fn parse(bytes: &[u8]) -> Parsed {
    let mut rest = bytes;
    let mut body = Vec::new();
    let count = match number(&mut rest, b'*') {
        Ok(Some(count)) => count,
        Ok(None) => return Parsed::NeedsMore,
        Err(reason) => return Parsed::Wrong(reason),
    };
    for _ in 0..count {
        let length = match number(&mut rest, b'$') {
            Ok(Some(length)) => length,
            Ok(None) => return Parsed::NeedsMore,
            Err(reason) => return Parsed::Wrong(reason),
        };
        if rest.len() < length + 2 {
            return Parsed::NeedsMore;
        }
        body.extend_from_slice(&rest[..length]);
        body.push(b'\n');
        rest = &rest[length + 2..];
    }
    if GOODBYE.starts_with(rest) {
        Parsed::Complete { body, keeps_open: true }
    } else {
        Parsed::Wrong(format!("after the answer came {}", shown(rest)))
    }
}

/// Takes a line that begins with `mark` and holds a number. None if it hasn't come yet.
fn number(rest: &mut &[u8], mark: u8) -> Result<Option<usize>, String> {
    let Some(end) = rest.windows(2).position(|window| window == b"\r\n") else { return Ok(None) };
    let (line, after) = (&rest[..end], &rest[end + 2..]);
    let digits = line.strip_prefix(&[mark]).and_then(|digits| std::str::from_utf8(digits).ok());
    let number =
        digits.and_then(|digits| digits.parse().ok()).ok_or_else(|| format!("got {}", shown(line)))?;
    *rest = after;
    Ok(Some(number))
}
