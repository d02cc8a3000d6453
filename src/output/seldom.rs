//! Lines of the log that a worker can cause at will: at most one a second.

use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub struct Seldom {
    last: Option<Instant>,
    left_out: u32,
}

impl Seldom {
    /// Whether a line may be written now, and what to add to it about those that were left out.
    pub fn take(&mut self, now: Instant) -> Option<String> {
        if self.last.is_some_and(|last| now.saturating_duration_since(last) < INTERVAL) {
            self.left_out = self.left_out.saturating_add(1);
            return None;
        }
        self.last = Some(now);
        Some(match std::mem::take(&mut self.left_out) {
            0 => String::new(),
            1 => " (and one more like it before)".to_owned(),
            more => format!(" (and {more} more like it before)"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_comes_once_a_second_and_says_how_many_were_left_out() {
        let (mut seldom, start) = (Seldom::default(), Instant::now());
        let mut at = |ms| seldom.take(start + Duration::from_millis(ms));
        assert_eq!(at(0).as_deref(), Some(""));
        assert_eq!([at(1), at(999)], [None, None]);
        assert_eq!(at(1000).as_deref(), Some(" (and 2 more like it before)"));
        assert_eq!(at(1500), None);
        assert_eq!(at(9000).as_deref(), Some(" (and one more like it before)"));
        assert_eq!(at(99_000).as_deref(), Some(""));
    }
}
