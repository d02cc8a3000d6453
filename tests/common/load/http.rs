//! HTTP/1 answers, parsed strictly.

use std::collections::HashSet;

/// The state of an answer of which some bytes have come.
pub enum Parsed {
    NeedsMore,
    Complete { body: Vec<u8>, keeps_open: bool },
    Wrong(String),
}

/// Parses an answer. `ended` means that no byte will follow.
pub fn parse(bytes: &[u8], ended: bool) -> Parsed {
    let Some(head_length) = find(bytes, b"\r\n\r\n") else {
        let plausible = bytes.len() < 64 * 1024 && b"HTTP/1.".starts_with(&bytes[..bytes.len().min(7)]);
        return if plausible {
            Parsed::NeedsMore
        } else {
            Parsed::Wrong(format!("not HTTP: {}", shown(bytes)))
        };
    };
    let body = &bytes[head_length + 4..];
    let Ok(head) = std::str::from_utf8(&bytes[..head_length]) else {
        return Parsed::Wrong(format!("not HTTP: {}", shown(bytes)));
    };
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap_or_default();
    if !status.starts_with("HTTP/1.1 200") && !status.starts_with("HTTP/1.0 200") {
        return Parsed::Wrong(format!("status line {status:?}"));
    }
    let mut keeps_open = status.starts_with("HTTP/1.1");
    let mut length: Option<usize> = None;
    let mut chunked = false;
    for line in lines {
        let Some((name, value)) = line.split_once(':') else {
            return Parsed::Wrong(format!("header line {line:?}"));
        };
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "content-length" => match value.parse() {
                Ok(number) => length = Some(number),
                Err(_) => return Parsed::Wrong(format!("header line {line:?}")),
            },
            "transfer-encoding" => chunked = value.eq_ignore_ascii_case("chunked"),
            "connection" => {
                let words: HashSet<String> =
                    value.split(',').map(|word| word.trim().to_ascii_lowercase()).collect();
                keeps_open = !words.contains("close") && (keeps_open || words.contains("keep-alive"));
            }
            _ => {}
        }
    }
    if chunked {
        return parse_chunks(body, keeps_open);
    }
    match length {
        Some(length) if body.len() > length => {
            Parsed::Wrong(format!("{} bytes of body where {length} were announced", body.len()))
        }
        Some(length) if body.len() == length => Parsed::Complete { body: body.to_vec(), keeps_open },
        None if keeps_open => Parsed::Wrong("neither a length nor Connection: close".to_owned()),
        None if ended => Parsed::Complete { body: body.to_vec(), keeps_open },
        _ => Parsed::NeedsMore,
    }
}

fn parse_chunks(mut rest: &[u8], keeps_open: bool) -> Parsed {
    let mut body = Vec::new();
    loop {
        let Some(line_length) = find(rest, b"\r\n") else { return Parsed::NeedsMore };
        let line = String::from_utf8_lossy(&rest[..line_length]);
        let size = line.split(';').next().unwrap_or_default().trim();
        let Ok(size) = usize::from_str_radix(size, 16) else {
            return Parsed::Wrong(format!("chunk size {line:?}"));
        };
        rest = &rest[line_length + 2..];
        if size == 0 {
            // Trailers may follow. An empty line ends the answer.
            loop {
                let Some(length) = find(rest, b"\r\n") else { return Parsed::NeedsMore };
                rest = &rest[length + 2..];
                if length == 0 {
                    break;
                }
            }
            return match rest.len() {
                0 => Parsed::Complete { body, keeps_open },
                extra => Parsed::Wrong(format!("{extra} bytes after the last chunk")),
            };
        }
        if rest.len() < size + 2 {
            return Parsed::NeedsMore;
        }
        if &rest[size..size + 2] != b"\r\n" {
            return Parsed::Wrong("a chunk is longer than it says".to_owned());
        }
        body.extend_from_slice(&rest[..size]);
        rest = &rest[size + 2..];
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// The beginning of what came, for an error.
pub fn shown(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(60)]).escape_debug().to_string()
}
