//! When a connection is idle. Pure.

use std::time::{Duration, Instant};

use crate::kernel::sockdiag::{Connection, Traffic};

/// A connection on which nothing has come yet is given so long to send its request.
const FIRST_REQUEST_TIMEOUT: Duration = Duration::from_secs(1);
/// A connection in doubt is idle when no data has moved for so long. Requests that take longer need
/// [`IdleRule::idle_after`]. At a stop there is less time, and a service without requests should end soon.
const DOUBT: Duration = Duration::from_secs(10);
const DOUBT_AT_STOP: Duration = Duration::from_secs(3);
/// With at most so many data segments from its client, a connection may be at its beginning: TLS (a ClientHello of one or
/// two segments, a Finished) and the settings of HTTP/2 (a preface, an acknowledgement, windows) come before the first
/// request or with it. What the server sends for these (session tickets, settings) goes out when the request is in already,
/// or, of a busy server, long after. Measured: 3 for HTTP/1 over TLS 1.3, 4 to 6 for HTTP/2.
const FIRST_SEGMENTS: u32 = 8;
/// With at most so many, or with segments of so many bytes on average, a first request may be an upload by HTTP/2: the server
/// has sent fewer segments than its client, and opens windows. Otherwise fewer segments mean nothing: a client may use several
/// small ones for each request.
const UPLOAD_SEGMENTS: u32 = 16;
const UPLOAD_SEGMENT_SIZE: u64 = 1000;

/// The kernel counts times in ticks of 1 to 10 ms (CONFIG_HZ).
const TICK: Duration = Duration::from_millis(10);

/// A client that waits for an answer is silent for so long, and some round trips, only if it has had the answer.
const PAUSE: Duration = Duration::from_millis(500);
const PAUSE_ROUND_TRIPS: u32 = 4;

/// What earlier polls have shown of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    segments_received: u32,
    /// Since when all that came looks answered.
    answered_since: Option<Instant>,
    /// Whether its beginning is over.
    has_begun: bool,
}

impl Seen {
    /// Adds what this poll shows. What comes after a pause is a new request. From then on what the server sends answers
    /// requests: what it sends by itself at the beginning has gone out in the pause at the latest.
    pub fn update(seen: Option<Self>, connection: &Connection, now: Instant) -> Self {
        let Traffic { segments_received, segments_sent, sent_ago, received_ago, round_trip, .. } =
            connection.traffic;
        let seen = seen.unwrap_or(Self { segments_received, answered_since: None, has_begun: false });
        let is_new = segments_received > seen.segments_received;
        let pause = PAUSE + round_trip * PAUSE_ROUND_TRIPS;
        let had_pause = seen.answered_since.is_some_and(|since| now - since >= pause);
        let looks_answered = segments_sent > 0 && sent_ago <= received_ago && connection.unread == 0;
        let since = seen.answered_since.filter(|_| !is_new).unwrap_or(now);
        Self {
            segments_received,
            answered_since: looks_answered.then_some(since),
            has_begun: seen.has_begun || is_new && had_pause,
        }
    }
}

/// Tells connections that wait for their client's next request from those that have a request under way. In doubt a
/// connection has one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IdleRule {
    /// How long no data must have moved on a connection, in either direction, if this was asked for.
    pub idle_after: Option<Duration>,
    /// For how long no datagram must have waited.
    pub quiet_after: Duration,
    pub is_stopping: bool,
}

impl IdleRule {
    /// Whether a worker has answered all datagrams, if it has read the last one then at the latest. The kernel doesn't count
    /// what it sends, so only time tells.
    pub fn is_quiet(&self, last: Instant, now: Instant) -> bool {
        let least = if self.is_stopping { self.quiet_after.min(DOUBT_AT_STOP) } else { self.quiet_after };
        now - last >= least
    }

    /// Whether the worker has no request of this connection to answer, by what the kernel knows.
    ///
    /// - It has one if something that came wasn't read, or something that it wrote wasn't sent. What was sent the kernel
    ///   delivers, even if the worker ends, so unacknowledged data doesn't count: its acknowledgement may be delayed
    ///   until the next request.
    /// - It has one if something came after the last data was sent.
    /// - If both were in the same tick, either may have come last: an answer, or the next request of a client that was
    ///   waiting for it. Acknowledgements tell them apart: see [`request_may_have_followed`].
    /// - At the beginning of a connection data goes out that answers no request: TLS session tickets, HTTP/2 settings,
    ///   `100 Continue`, the first event of a stream. Nothing tells it from an answer, so the connection is in doubt.
    /// - Later the last data is the answer to the last request, if the protocol is HTTP/1. HTTP/2 answers one request
    ///   while another is under way, and a stream's pauses look like its end: this takes `idle_after`.
    pub fn is_idle(&self, connection: &Connection, seen: &Seen) -> bool {
        let traffic = connection.traffic;
        if connection.unread > 0 || traffic.unsent > 0 {
            return false;
        }
        let has_received = traffic.received > 0;
        if has_received && (traffic.segments_sent == 0 || traffic.received_ago < traffic.sent_ago) {
            return false;
        }
        let is_young = traffic.segments_received <= FIRST_SEGMENTS || may_be_upload(&traffic);
        let doubt = if self.is_stopping { DOUBT_AT_STOP } else { DOUBT };
        let least = match has_received {
            false => FIRST_REQUEST_TIMEOUT,
            true if self.idle_after.is_some() => Duration::ZERO,
            true if is_young && !seen.has_begun || request_may_have_followed(&traffic) => doubt,
            true => Duration::ZERO,
        };
        let quiet_for = if has_received { traffic.sent_ago } else { traffic.received_ago };
        quiet_for >= least.max(self.idle_after.unwrap_or_default())
    }
}

fn may_be_upload(traffic: &Traffic) -> bool {
    let segments = traffic.segments_received;
    let is_large = traffic.received >= u64::from(segments) * UPLOAD_SEGMENT_SIZE;
    traffic.segments_sent < segments && (segments <= UPLOAD_SEGMENTS || is_large)
}

/// Whether a request may have come after the last data was sent, in the same tick.
///
/// It would acknowledge that data. And its client, which waits for the answer, would send nothing more. So no request
/// has followed if the last data isn't acknowledged yet, or if an acknowledgement came later: where nothing follows, it comes
/// after 40 ms (tcp(7), delayed acknowledgements). A client that acknowledges each answer at once shows neither; it is known
/// by having sent many segments without data.
///
/// For two ticks it isn't asked: with clients that never pause there is always such a connection, and the worker would never
/// be drained.
fn request_may_have_followed(traffic: &Traffic) -> bool {
    let is_same_tick = traffic.received_ago < traffic.sent_ago + TICK;
    let is_acknowledged = traffic.unacknowledged == 0 && traffic.acknowledged_ago + TICK > traffic.sent_ago;
    let is_silent = traffic.sent_ago >= TICK * 2;
    is_silent && is_same_tick && is_acknowledged && traffic.bare_segments_received * 2 < traffic.segments_sent
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Segments received and sent, and milliseconds since the last of each.
    fn connection(segments: (u32, u32), received_ago: u64, sent_ago: u64) -> Connection {
        let traffic = Traffic {
            sent_ago: Duration::from_millis(sent_ago),
            received_ago: Duration::from_millis(received_ago),
            unsent: 0,
            segments_received: segments.0,
            segments_sent: segments.1,
            acknowledged_ago: Duration::ZERO,
            unacknowledged: 0,
            bare_segments_received: 4,
            round_trip: Duration::ZERO,
            received: u64::from(segments.0) * 100,
            acknowledged: 0,
        };
        let (local, peer) = ("127.0.0.1:80".parse().unwrap(), "127.0.0.1:1".parse().unwrap());
        Connection { local, peer, opening: false, inode: 1, unread: 0, traffic }
    }

    /// By one poll.
    fn is_idle(idle_after: Option<u64>, connection: &Connection) -> bool {
        let rule = IdleRule { idle_after: idle_after.map(Duration::from_millis), ..IdleRule::default() };
        rule.is_idle(connection, &Seen::update(None, connection, Instant::now()))
    }

    #[test]
    fn a_connection_is_idle_when_all_that_came_was_answered() {
        let cases = [
            ("answered", (20, 20), 20, 10, true),
            ("answered in the same tick", (20, 20), 20, 20, true),
            ("the next request is being worked on", (21, 20), 10, 20, false),
            ("so is the first", (1, 0), 4000, 5000, false),
            ("a request may be on its way", (0, 0), 500, 500, false),
            ("none came in time", (0, 0), 1000, 1000, true),
            ("a server that speaks first has spoken", (0, 1), 1000, 10, true),
            ("requests of two segments each", (40, 20), 20, 10, true),
        ];
        for (what, segments, received_ago, sent_ago, expected) in cases {
            let connection = connection(segments, received_ago, sent_ago);
            assert_eq!(is_idle(None, &connection), expected, "{what}");
        }
        let answered = connection((20, 20), 20, 10);
        assert!(!is_idle(None, &Connection { unread: 1, ..answered }));
        let unsent = Traffic { unsent: 1, ..answered.traffic };
        assert!(!is_idle(None, &Connection { traffic: unsent, ..answered }));
    }

    /// Measured on Linux 6.18 with Node and a client in Python: requests without a pause, then one of 3 s or none.
    #[test]
    fn a_request_in_the_tick_of_the_last_answer_is_told_from_that_answer_by_acknowledgements() {
        let after = |acknowledged_ago, unacknowledged, bare_segments_received| {
            let mut connection = connection((22, 21), 1012, 1012);
            connection.traffic.acknowledged_ago = Duration::from_millis(acknowledged_ago);
            connection.traffic.unacknowledged = unacknowledged;
            connection.traffic.bare_segments_received = bare_segments_received;
            is_idle(None, &connection)
        };
        assert!(!after(1012, 0, 5), "the request has acknowledged the answer");
        assert!(after(968, 0, 4), "the client has acknowledged the answer 44 ms later");
        assert!(after(1012, 1, 4), "the answer isn't acknowledged, as it is sent");
        assert!(after(1012, 0, 20), "this client acknowledges each answer at once");
        assert!(!is_idle(None, &connection((3, 3), 20, 20)), "a young one is in doubt all the same");
        let mut recent = connection((22, 21), 16, 16);
        recent.traffic.acknowledged_ago = Duration::from_millis(16);
        assert!(is_idle(None, &recent), "clients without a pause are always in this state");
    }

    /// Measured on Linux 6.18 with Node, Python and curl.
    #[test]
    fn a_first_request_that_looks_answered_is_in_doubt_until_nothing_has_moved_for_ten_seconds() {
        let cases = [
            ("100 Continue was sent, the body waits", (1, 1), 116, 112),
            ("TLS 1.3, the first request is in flight", (2, 2), 416, 416),
            ("TLS 1.3, tickets were sent late", (2, 2), 416, 366),
            ("TLS 1.2, connected", (2, 2), 348, 348),
            ("HTTP/2, connected", (2, 2), 344, 344),
            ("HTTP/2 over TLS, the first request is in flight", (4, 5), 420, 416),
            ("HTTP/2, a fast request was answered, a slow one is in flight", (4, 3), 48, 24),
            ("a stream of events pauses", (1, 4), 1416, 400),
        ];
        for (what, segments, received_ago, sent_ago) in cases {
            assert!(!is_idle(None, &connection(segments, received_ago, sent_ago)), "{what}");
            let later = 10_000 - sent_ago;
            let quiet = connection(segments, received_ago + later, sent_ago + later);
            assert!(is_idle(None, &quiet), "{what}");
        }
    }

    #[test]
    fn datagrams_are_answered_when_none_came_for_the_time_that_was_asked_for_and_at_a_stop_after_three_seconds()
     {
        let start = Instant::now();
        let is_quiet = |after, is_stopping, ms| {
            let rule =
                IdleRule { quiet_after: Duration::from_secs(after), is_stopping, ..IdleRule::default() };
            rule.is_quiet(start, start + Duration::from_millis(ms))
        };
        assert!(!is_quiet(5, false, 4999) && is_quiet(5, false, 5000));
        assert!(!is_quiet(5, true, 2999) && is_quiet(5, true, 3000) && is_quiet(2, true, 2000));
        assert!(is_quiet(0, false, 0));
    }

    #[test]
    fn at_a_stop_doubt_ends_after_three_seconds() {
        let is_idle = |sent_ago| {
            let connection = connection((2, 2), sent_ago, sent_ago);
            let rule = IdleRule { is_stopping: true, ..IdleRule::default() };
            rule.is_idle(&connection, &Seen::update(None, &connection, Instant::now()))
        };
        assert!(!is_idle(2999) && is_idle(3000));
    }

    #[test]
    fn a_time_that_was_asked_for_holds_for_every_connection_instead_of_doubt() {
        let old = |quiet| connection((40, 40), quiet + 20, quiet);
        let young = |quiet| connection((2, 2), quiet, quiet);
        for connection in [old, young] {
            assert!(!is_idle(Some(2000), &connection(1999)) && is_idle(Some(2000), &connection(2000)));
            assert!(is_idle(Some(0), &connection(0)));
        }
        let fresh = connection((0, 0), 1500, 1500);
        assert!(is_idle(Some(0), &fresh) && !is_idle(Some(2000), &fresh));
    }

    #[test]
    fn a_connection_is_not_in_doubt_any_more_when_a_request_comes_after_a_pause() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let answered = |requests| connection((requests, requests), 20, 20);
        let is_idle = |connection: &Connection, seen: &Seen| IdleRule::default().is_idle(connection, seen);
        let first = Seen::update(None, &answered(2), at(0));
        let soon = Seen::update(Some(first), &answered(3), at(499));
        assert!(!is_idle(&answered(3), &soon), "this may be the first request, after the handshake");
        let quiet = Seen::update(Some(soon), &answered(3), at(998));
        assert!(!is_idle(&answered(3), &quiet), "nothing has come");
        let later = Seen::update(Some(quiet), &answered(4), at(999));
        assert!(is_idle(&answered(4), &later));
        assert!(is_idle(&answered(4), &Seen::update(Some(later), &answered(4), at(1000))));
        let mut slow = answered(4);
        slow.traffic.round_trip = Duration::from_millis(200);
        assert!(!is_idle(&slow, &Seen::update(Some(quiet), &slow, at(1797))), "its handshake takes longer");

        let hello = Seen::update(None, &connection((1, 0), 20, 40), at(0));
        let tickets = Seen::update(Some(hello), &connection((3, 3), 20, 20), at(700));
        assert!(!is_idle(&connection((3, 3), 20, 20), &tickets), "the server was slow, not the client");
    }

    #[test]
    fn an_upload_is_in_doubt_however_long_it_is_and_small_requests_of_several_segments_are_not() {
        let of_size = |bytes: u64| {
            let mut connection = connection((100, 50), 1000, 900);
            connection.traffic.received = 100 * bytes;
            is_idle(None, &connection)
        };
        assert!(!of_size(1448) && of_size(400));
    }

    proptest! {
        #[test]
        fn an_idle_connection_stays_idle_while_nothing_moves(
            segments in (0_u32..30, 0_u32..30),
            received_ago in 0_u64..20_000,
            sent_ago in 0_u64..20_000,
            later in 0_u64..20_000,
            idle_after in proptest::option::of(0_u64..20_000),
        ) {
            let (now, then) = (connection(segments, received_ago, sent_ago),
                connection(segments, received_ago + later, sent_ago + later));
            prop_assert!(!is_idle(idle_after, &now) || is_idle(idle_after, &then));
        }

        #[test]
        fn a_connection_with_an_answer_to_come_is_never_idle(
            segments in (1_u32..30, 0_u32..30),
            received_ago in 0_u64..20_000,
            longer in 1_u64..20_000,
            idle_after in proptest::option::of(0_u64..20_000),
        ) {
            prop_assert!(!is_idle(idle_after, &connection(segments, received_ago, received_ago + longer)));
        }

        #[test]
        fn more_time_is_never_less_careful(
            segments in (0_u32..30, 0_u32..30),
            received_ago in 0_u64..20_000,
            sent_ago in 0_u64..20_000,
            idle_after in (0_u64..20_000, 0_u64..20_000),
        ) {
            let connection = connection(segments, received_ago, sent_ago);
            let (less, more) = (idle_after.0.min(idle_after.1), idle_after.0.max(idle_after.1));
            prop_assert!(!is_idle(Some(more), &connection) || is_idle(Some(less), &connection));
        }
    }
}
