//! Splits a stream of bytes into lines.

/// What happens to a line that is longer than the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TooLong {
    /// It becomes several lines.
    Split,
    /// It is left out.
    Drop,
}

/// Splits a stream into lines, however the stream is cut into reads. It keeps at most one line.
#[derive(Debug)]
pub struct Lines {
    /// The beginning of a line whose newline hasn't come yet.
    unfinished: Vec<u8>,
    /// In bytes, without the newline.
    max_length: usize,
    too_long: TooLong,
    /// Whether the rest of the current line is dropped.
    dropping: bool,
}

impl Lines {
    pub fn new(max_length: usize, too_long: TooLong) -> Self {
        Self { unfinished: Vec::new(), max_length, too_long, dropping: false }
    }

    /// Hands each line that is complete now to `line`, without its newline.
    pub fn take(&mut self, bytes: &[u8], line: &mut impl FnMut(&[u8])) {
        for part in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (mut text, ended) = match part.split_last() {
                Some((b'\n', text)) => (text, true),
                _ => (part, false),
            };
            while self.too_long == TooLong::Split && self.unfinished.len() + text.len() > self.max_length {
                let (fits, later) = text.split_at(self.max_length - self.unfinished.len());
                self.unfinished.extend_from_slice(fits);
                line(&self.unfinished);
                self.unfinished.clear();
                text = later;
            }
            self.dropping |= self.unfinished.len() + text.len() > self.max_length;
            match ended {
                _ if self.dropping => self.dropping = !ended,
                // The usual case, without a copy.
                true if self.unfinished.is_empty() => line(text),
                true => {
                    self.unfinished.extend_from_slice(text);
                    line(&self.unfinished);
                }
                false => {
                    self.unfinished.extend_from_slice(text);
                    continue;
                }
            }
            self.unfinished.clear();
        }
    }

    /// The stream has ended: a last line without a newline counts as a line.
    pub fn end(&mut self, line: &mut impl FnMut(&[u8])) {
        if !self.unfinished.is_empty() {
            line(&std::mem::take(&mut self.unfinished));
        }
    }

    /// The beginning of a line whose newline hasn't come yet.
    pub fn unfinished(&self) -> &[u8] {
        &self.unfinished
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAX_LENGTH: usize = 64;

    fn split(stream: &[u8], cuts: Vec<usize>, too_long: TooLong) -> Vec<Vec<u8>> {
        let (mut lines, mut rest, mut read) = (Lines::new(MAX_LENGTH, too_long), stream, Vec::new());
        let mut line = |text: &[u8]| read.push(text.to_vec());
        for cut in cuts {
            let (part, later) = rest.split_at(cut.min(rest.len()));
            lines.take(part, &mut line);
            rest = later;
        }
        lines.take(rest, &mut line);
        lines.end(&mut line);
        assert!(lines.unfinished().is_empty());
        read
    }

    fn text() -> impl Strategy<Value = String> {
        prop_oneof!["[a-z]{0,10}", "[a-z]{62,66}", "[a-z]{0,200}"]
    }

    fn cuts() -> impl Strategy<Value = Vec<usize>> {
        proptest::collection::vec(prop_oneof![1..5usize, 1..100usize], 0..40)
    }

    mod fuzz {
        use super::*;

        proptest! {
            #[test]
            fn lines_are_the_same_however_the_stream_is_cut(
                texts in proptest::collection::vec(text(), 0..8), ended: bool, cuts in cuts(),
            ) {
                let mut stream = texts.join("\n");
                if ended && !texts.is_empty() {
                    stream.push('\n');
                }
                let mut expected = Vec::new();
                for line in stream.split_inclusive('\n') {
                    let text = line.strip_suffix('\n').unwrap_or(line);
                    expected.extend(text.as_bytes().chunks(MAX_LENGTH).map(<[u8]>::to_vec));
                    if text.is_empty() {
                        expected.push(Vec::new());
                    }
                }
                prop_assert_eq!(split(stream.as_bytes(), cuts, TooLong::Split), expected);
            }

            #[test]
            fn a_line_that_is_too_long_is_dropped_alone(
                texts in proptest::collection::vec(text(), 0..8), cuts in cuts(),
            ) {
                let stream: String = texts.iter().map(|text| format!("{text}\n")).collect();
                let short = texts.into_iter().filter(|text| text.len() <= MAX_LENGTH);
                let expected: Vec<Vec<u8>> = short.map(String::into_bytes).collect();
                prop_assert_eq!(split(stream.as_bytes(), cuts, TooLong::Drop), expected);
            }
        }
    }
}
