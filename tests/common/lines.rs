//! The lines that a program prints.
#![allow(dead_code)]

use std::io::{BufRead, BufReader, Read};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// A line that was printed, and when it was read.
#[derive(Clone, Debug)]
pub struct Line {
    pub text: String,
    pub at: Instant,
}

/// The lines of a stream, collected as they come.
#[derive(Clone, Default)]
pub struct Lines {
    state: Arc<(Mutex<Vec<Line>>, Condvar)>,
}

impl Lines {
    pub fn read(&self, stream: impl Read + Send + 'static) -> JoinHandle<()> {
        let lines = self.clone();
        thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut bytes = Vec::new();
            while let Ok(count) = stream.read_until(b'\n', &mut bytes) {
                if count == 0 {
                    break;
                }
                lines.push(String::from_utf8_lossy(&bytes).trim_end_matches('\n'));
                bytes.clear();
            }
        })
    }

    pub fn push(&self, text: &str) {
        self.lock().push(Line { text: text.to_owned(), at: Instant::now() });
        self.state.1.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Line>> {
        self.state.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many there are, to wait for later ones.
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    pub fn all(&self) -> Vec<Line> {
        self.all_from(0)
    }

    /// All lines from number `from` on.
    pub fn all_from(&self, from: usize) -> Vec<Line> {
        self.lock().iter().skip(from).cloned().collect()
    }

    /// The first line, from number `from` on, that contains `part`.
    pub fn find(&self, from: usize, part: &str) -> Option<Line> {
        self.lock().iter().skip(from).find(|line| line.text.contains(part)).cloned()
    }

    /// How many lines contain `part`.
    pub fn count_of(&self, part: &str) -> usize {
        self.lock().iter().filter(|line| line.text.contains(part)).count()
    }

    pub fn text(&self) -> String {
        let texts: Vec<String> = self.lock().iter().map(|line| line.text.clone()).collect();
        texts.join("\n")
    }

    /// Waits for a line, from number `from` on, that is `wanted`.
    pub fn wait_for(&self, from: usize, deadline: Duration, wanted: impl Fn(&str) -> bool) -> Option<Line> {
        self.wait_for_nth(1, from, deadline, wanted)
    }

    /// Waits for the `n`th line, from number `from` on, that is `wanted`.
    pub fn wait_for_nth(
        &self,
        n: usize,
        from: usize,
        deadline: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> Option<Line> {
        let end = Instant::now() + deadline;
        let mut left = n;
        let mut next = from;
        let mut lines = self.lock();
        loop {
            for line in lines.iter().skip(next).filter(|line| wanted(&line.text)) {
                left -= 1;
                if left == 0 {
                    return Some(line.clone());
                }
            }
            next = lines.len().max(from);
            let time = end.saturating_duration_since(Instant::now());
            if time.is_zero() {
                return None;
            }
            lines = self.state.1.wait_timeout(lines, time).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
