//! What a worker has answered to a probe. Pure: bytes in, an outcome out.

use std::time::Duration;

use humantime::format_duration;

use crate::words::printable;

/// How long a request may take, with its connection.
pub const TIME_OUT: Duration = Duration::from_secs(1);

/// A header that is longer is no answer.
const MAX_HEADER: usize = 16 * 1024;
/// So much of a body is read, so that the worker can write it to its end.
const MAX_BODY: u64 = 1024 * 1024;
/// More of the header's lines are not read.
const MAX_LINES: usize = 128;

/// Why no more bytes come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The worker has closed the connection.
    Closed,
    TimedOut,
}

/// The answer to one request, as far as it has been read.
#[derive(Debug, Default)]
pub struct Answer {
    /// The header, as long as it isn't complete.
    header: Vec<u8>,
    status: Option<Status>,
    /// How many bytes of the body are left to read.
    body: u64,
}

#[derive(Debug)]
enum Status {
    /// The code, and the reason as the worker gives it.
    Of(u16, String),
    TooLong,
    NotHttp,
}

impl Answer {
    /// Takes the next bytes. Returns whether the answer is complete, or can't become one.
    pub fn add(&mut self, bytes: &[u8]) -> bool {
        if self.status.is_some() {
            self.body = self.body.saturating_sub(bytes.len() as u64);
            return self.body == 0;
        }
        self.header.extend(bytes);
        while self.status.is_none() {
            let Some(len) = self.read_header() else { return false };
            self.header.drain(..len);
        }
        self.body = self.body.saturating_sub(self.header.len() as u64);
        self.header = Vec::new();
        self.body == 0
    }

    /// Reads a header, and returns its length; `None` if it isn't complete. One that only announces the answer (1xx) leaves
    /// no status.
    fn read_header(&mut self) -> Option<usize> {
        let mut lines = [httparse::EMPTY_HEADER; MAX_LINES];
        let mut response = httparse::Response::new(&mut lines);
        let mut config = httparse::ParserConfig::default();
        config.ignore_invalid_headers_in_responses(true);
        let parsed = config.parse_response(&mut response, &self.header);
        let (status, len) = match (parsed, response.code) {
            (Ok(httparse::Status::Complete(len)), Some(100 | 102..200)) => return Some(len),
            (Ok(httparse::Status::Complete(len)), Some(code)) => {
                self.body = body_length(code, response.headers);
                (Status::Of(code, printable(response.reason.unwrap_or_default().as_bytes())), len)
            }
            // Its length is unknown then, as that of many others.
            (Err(httparse::Error::TooManyHeaders), Some(code)) if has_end(&self.header) => {
                self.body = MAX_BODY;
                (Status::Of(code, printable(response.reason.unwrap_or_default().as_bytes())), 0)
            }
            (Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders), _)
                if self.header.len() <= MAX_HEADER =>
            {
                return None;
            }
            (Ok(_) | Err(httparse::Error::TooManyHeaders), _) => (Status::TooLong, 0),
            (Err(_), _) => (Status::NotHttp, 0),
        };
        self.status = Some(status);
        Some(len)
    }

    /// What the worker did about a request such as "GET /healthz", if no more bytes are read. The text follows its name.
    pub fn outcome(&self, request: &str, end: End) -> Result<(), String> {
        let what = match (&self.status, end) {
            (Some(Status::Of(200..400, _)), _) => return Ok(()),
            (Some(Status::Of(code, reason)), _) => format!("answered {request} with {code} {reason}"),
            (Some(Status::TooLong), _) => {
                format!("answered {request} with a header of more than {} KiB", MAX_HEADER / 1024)
            }
            (Some(Status::NotHttp), _) => {
                format!(
                    "answered {request} with something that is not HTTP/1 (a TLS port? --ready /path speaks plain HTTP)"
                )
            }
            (None, End::TimedOut) if self.header.is_empty() => {
                format!("did not answer {request} within {}", format_duration(TIME_OUT))
            }
            (None, End::TimedOut) => {
                let time_out = format_duration(TIME_OUT);
                format!("did not end the header of its answer to {request} within {time_out}")
            }
            (None, End::Closed) if self.header.is_empty() => {
                format!(
                    "closed the connection without an answer to {request} (a TLS port? --ready /path speaks plain HTTP)"
                )
            }
            (None, End::Closed) => {
                format!("closed the connection within the header of its answer to {request}")
            }
        };
        Err(what.trim_end().to_owned())
    }
}

/// Whether an empty line is in it.
fn has_end(header: &[u8]) -> bool {
    header.windows(3).any(|bytes| bytes == b"\n\r\n") || header.windows(2).any(|bytes| bytes == b"\n\n")
}

/// How long the body is at most, as far as it is read.
fn body_length(code: u16, lines: &[httparse::Header]) -> u64 {
    let length = |line: &httparse::Header| std::str::from_utf8(line.value).ok()?.trim().parse().ok();
    let named = lines.iter().find(|line| line.name.eq_ignore_ascii_case("content-length"));
    match code {
        204 | 304 => 0,
        _ => named.and_then(length).unwrap_or(MAX_BODY).min(MAX_BODY),
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// What is said after these bytes, and whether more were wanted.
    fn said(bytes: &[u8], end: End) -> (Result<(), String>, bool) {
        let mut answer = Answer::default();
        let is_complete = answer.add(bytes);
        (answer.outcome("GET /healthz", end), !is_complete)
    }

    #[test]
    fn a_status_of_2xx_or_3xx_is_an_answer_and_any_other_is_named() {
        for status in ["200 OK", "204 No Content", "301 Moved Permanently", "304 Not Modified", "399", "200 "]
        {
            let text = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n");
            assert_eq!(said(text.as_bytes(), End::TimedOut), (Ok(()), false), "{status}");
        }
        for (status, named) in [
            ("503 Service Unavailable", "503 Service Unavailable"),
            ("404", "404"),
            ("500 ", "500"),
            ("101 Switching Protocols", "101 Switching Protocols"),
            ("400 \x1b[2J", "something that is not HTTP/1 (a TLS port? --ready /path speaks plain HTTP)"),
        ] {
            let (outcome, _) = said(format!("HTTP/1.0 {status}\r\n\r\n").as_bytes(), End::Closed);
            assert_eq!(outcome, Err(format!("answered GET /healthz with {named}")), "{status}");
        }
    }

    #[test]
    fn what_is_no_answer_is_described() {
        let long = [b"HTTP/1.1 200 OK\r\nX: ".as_slice(), &[b'x'; MAX_HEADER]].concat();
        let endless = [b"HTTP/1.1 200 OK\r\n".as_slice(), &b"X: y\r\n".repeat(MAX_HEADER / 6)].concat();
        let cases: [(&[u8], End, &str); 11] = [
            (b"", End::TimedOut, "did not answer GET /healthz within 1s"),
            (b"", End::Closed, "closed the connection without an answer to GET /healthz (a TLS port?"),
            (
                b"HTTP/1.1 200 OK\r\nX",
                End::TimedOut,
                "did not end the header of its answer to GET /healthz within 1s",
            ),
            (
                b"HTTP/1.1 200 OK\r\nX",
                End::Closed,
                "closed the connection within the header of its answer to GET",
            ),
            (
                b"\x15\x03\x01\x00\x02\x02\x46",
                End::Closed,
                "answered GET /healthz with something that is not HTTP/1 (a",
            ),
            (
                b"\0\0\x12\x04\0\0",
                End::TimedOut,
                "answered GET /healthz with something that is not HTTP/1 (a TLS port?",
            ),
            (b"hello\n", End::Closed, "answered GET /healthz with something that is not HTTP/1 (a TLS port?"),
            (
                b"HTTP/2 200 OK\r\n\r\n",
                End::Closed,
                "answered GET /healthz with something that is not HTTP/1",
            ),
            (&endless, End::TimedOut, "answered GET /healthz with a header of more than 16 KiB"),
            (
                &endless[..5000],
                End::TimedOut,
                "did not end the header of its answer to GET /healthz within 1s",
            ),
            (&long, End::TimedOut, "answered GET /healthz with a header of more than 16 KiB"),
        ];
        for (bytes, end, part) in cases {
            let (outcome, _) = said(bytes, end);
            let text = outcome.unwrap_err();
            assert!(text.starts_with(part), "{text}");
        }
    }

    #[test]
    fn what_announces_an_answer_is_none_itself() {
        let hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n";
        let (outcome, wants_more) = said(hints, End::TimedOut);
        assert_eq!((outcome.is_ok(), wants_more), (false, true));
        let whole = [
            hints.as_slice(),
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
        ]
        .concat();
        assert_eq!(said(&whole, End::TimedOut), (Ok(()), false));
    }

    #[test]
    fn the_body_is_read_to_its_end_or_to_a_mebibyte() {
        let mut answer = Answer::default();
        assert!(!answer.add(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab"));
        assert!(!answer.add(b"cd"));
        assert!(answer.add(b"e"));
        for header in ["Content-Length: 10000000", "Content-Length: many", "X: y"] {
            let mut answer = Answer::default();
            assert!(!answer.add(format!("HTTP/1.1 200 OK\r\n{header}\r\n\r\n").as_bytes()), "{header}");
            let chunks = (0..).take_while(|_| !answer.add(&[0; 64 * 1024])).count();
            assert_eq!(chunks, 15, "{header}");
        }
    }

    #[test]
    fn a_header_with_very_many_lines_has_its_status() {
        let lines = "X: y\r\n".repeat(2 * MAX_LINES);
        let text = format!("HTTP/1.1 503 Service Unavailable\r\n{lines}\r\n");
        let (outcome, _) = said(text.as_bytes(), End::Closed);
        assert_eq!(outcome, Err("answered GET /healthz with 503 Service Unavailable".to_owned()));
    }

    /// What answers may be any program.
    mod fuzz {
        use super::*;

        proptest! {
            #[test]
            fn any_bytes_have_an_outcome_on_one_line(chunks in vec(vec(any::<u8>(), 0..200), 0..20), closed: bool) {
                let mut answer = Answer::default();
                let _ = chunks.iter().any(|chunk| answer.add(chunk));
                let end = if closed { End::Closed } else { End::TimedOut };
                let outcome = answer.outcome("GET /", end);
                let text = outcome.expect_err("no such bytes are an answer");
                prop_assert!(!text.contains(char::is_control) && text.len() < 400);
            }

            /// However the answer is cut into pieces.
            #[test]
            fn the_status_alone_decides(
                code in 200u16..600, body in vec(any::<u8>(), 0..100), cuts in vec(any::<prop::sample::Index>(), 0..5)
            ) {
                let head = format!("HTTP/1.1 {code} Some reason\r\nContent-Length: {}\r\nServer: x\r\n\r\n", body.len());
                let whole = [head.as_bytes(), &body].concat();
                let mut places: Vec<usize> = cuts.iter().map(|cut| cut.index(whole.len())).collect();
                places.extend([0, whole.len()]);
                places.sort_unstable();
                let mut answer = Answer::default();
                let mut complete = Vec::new();
                for piece in places.windows(2).map(|places| &whole[places[0]..places[1]]) {
                    complete.push(answer.add(piece));
                }
                prop_assert_eq!(complete.last(), Some(&true));
                let expected = if code < 400 { Ok(()) } else { Err(format!("answered GET / with {code} Some reason")) };
                prop_assert_eq!(answer.outcome("GET /", End::Closed), expected);
            }

            /// Whatever a header holds, no more of it is kept than [`MAX_HEADER`] and one read, and no more of a body is read than
            /// [`MAX_BODY`].
            #[test]
            fn what_is_kept_and_read_of_an_answer_is_bounded(
                lines in vec("[ -~]{0,30}", 0..4), repeat in 1usize..20_000, ended: bool, piece in 1usize..70_000
            ) {
                let line: String = lines.iter().map(|line| format!("{line}\r\n")).collect();
                let end = if ended { "\r\n" } else { "" };
                let mut stream = format!("HTTP/1.1 200 OK\r\n{}{end}", line.repeat((repeat / line.len().max(1)).max(1)));
                stream.push_str(&"x".repeat(2 * MAX_BODY as usize));
                let (mut answer, mut read) = (Answer::default(), 0);
                for piece in stream.as_bytes().chunks(piece) {
                    read += piece.len();
                    let is_complete = answer.add(piece);
                    prop_assert!(answer.header.len() <= MAX_HEADER + piece.len());
                    if is_complete {
                        break;
                    }
                }
                prop_assert!(read <= MAX_HEADER + MAX_BODY as usize + 2 * piece);
            }
        }
    }
}
