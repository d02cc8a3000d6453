//! Text helpers for log lines, replies and tables.

use std::time::Duration;

/// "1 worker", "4 workers"
pub fn count(n: usize, noun: &str) -> String {
    format!("{n} {noun}{}", if n == 1 { "" } else { "s" })
}

/// The items with a space between each two.
pub fn list(items: impl IntoIterator<Item = impl ToString>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(" ")
}

/// "186 ms", and "12.3 s" from 10 seconds on.
pub fn millis(duration: Duration) -> String {
    match duration.as_millis() {
        ms @ 0..10_000 => format!("{ms} ms"),
        ms => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
    }
}

/// A text that came from outside, on one line: so that nobody can make it look like other lines, or command the terminal
/// that shows it. Control characters are escaped, and what changes the direction of text.
pub fn escaped(text: &str) -> String {
    let escape = |c: char| if is_unsafe(c) { c.escape_default().to_string() } else { c.to_string() };
    text.chars().map(escape).collect()
}

/// Whether a character controls how others are shown, instead of being shown itself.
pub fn is_unsafe(c: char) -> bool {
    const INVISIBLE: [std::ops::RangeInclusive<char>; 4] = [
        '\u{200b}'..='\u{200f}', // zero width, direction
        '\u{2028}'..='\u{202e}', // line and paragraph separators, direction
        '\u{2060}'..='\u{206f}', // invisible operators, direction
        '\u{feff}'..='\u{feff}',
    ];
    c.is_control() || INVISIBLE.iter().any(|range| range.contains(&c))
}

/// As [`escaped`], for any bytes: a zero byte becomes a space. At most 200 characters of it.
pub fn printable(text: &[u8]) -> String {
    const MAX_CHARS: usize = 200;
    let text = String::from_utf8_lossy(text).replace('\0', " ");
    let text: String = text.trim_end().chars().take(MAX_CHARS).collect();
    escaped(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_from_outside_cannot_pass_for_lines_of_the_log() {
        assert_eq!(printable(b"python3\0-m\0http.server\0"), "python3 -m http.server");
        assert_eq!(printable(b"x\nreuse-run[1]: error\x1b[2J"), "x\\nreuse-run[1]: error\\u{1b}[2J");
        assert_eq!(printable(&[b'x'; 5000]).len(), 200);
        assert_eq!(escaped("straße \u{202e}x\u{9b}2J\u{2028}"), "straße \\u{202e}x\\u{9b}2J\\u{2028}");
    }

    #[test]
    fn texts_count_and_measure_as_people_do() {
        assert_eq!([count(1, "worker"), count(4, "worker")], ["1 worker", "4 workers"]);
        assert_eq!(list(["a", "b"]), "a b");
        assert_eq!(millis(Duration::from_millis(9_999)), "9999 ms");
        assert_eq!(millis(Duration::from_millis(12_345)), "12.3 s");
    }

    mod fuzz {
        use proptest::prelude::*;

        use super::*;

        proptest! {
            #[test]
            fn of_any_bytes_one_line_is_shown_that_controls_nothing(bytes: Vec<u8>) {
                let text = printable(&bytes);
                prop_assert!(!text.contains(is_unsafe));
                prop_assert!(text.len() <= 200 * 10); // the longest escape has 10 characters
            }

            #[test]
            fn a_text_that_controls_nothing_is_shown_as_it_is(text: String) {
                let shown = escaped(&text);
                prop_assert!(!shown.contains(is_unsafe));
                prop_assert_eq!(shown == text, !text.contains(is_unsafe));
            }
        }
    }
}
