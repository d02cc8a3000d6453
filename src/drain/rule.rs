//! When a connection is idle. Pure.

use std::time::Duration;

use crate::kernel::sockdiag::Connection;

/// A connection on which nothing has come yet is given so long to send its request.
const FIRST_REQUEST_TIMEOUT: Duration = Duration::from_secs(1);
/// With at most so many data segments from its client, a connection may be in a TLS handshake. The client sends its
/// ClientHello, its Finished and its first request, and the server's session tickets for the Finished go out when the
/// request is in already, or, of a busy server, long after.
const HANDSHAKE_SEGMENTS: u32 = 3;
/// With at most so many data segments from its client, a connection may be in the settings of HTTP/2. The client
/// acknowledges the server's settings in a segment of its own and opens windows in others, so the server has sent fewer
/// segments than its client while the first request is under way. Later, fewer segments mean nothing: a client may use
/// several for each request.
const SETTINGS_SEGMENTS: u32 = 16;

/// Tells connections that wait for their client's next request from those that have a request under way. In doubt a
/// connection has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdleRule {
    /// How long no data must have moved on a connection, in either direction, where this was asked for.
    idle_after: Option<Duration>,
    /// How long it must be where the kernel's figures don't tell.
    in_doubt: Duration,
}

impl IdleRule {
    /// In doubt a connection is idle when no data has moved for as long as a drain lasts.
    pub fn new(idle_after: Option<Duration>, drain: Duration) -> Self {
        Self { idle_after, in_doubt: drain }
    }

    /// Whether the worker has no request of this connection to answer, by what the kernel knows.
    ///
    /// - It has one if something that came wasn't read, or something that it wrote wasn't sent. What was sent the kernel
    ///   delivers, even if the worker ends, so unacknowledged data doesn't count: its acknowledgement may be delayed
    ///   until the next request.
    /// - It has one if something came after the last data was sent. The kernel counts these times in ticks of 1 to 10
    ///   ms. A request that arrives in the tick in which the answer to the last one left looks answered.
    /// - On a young connection data goes out that answers no request: TLS session tickets, HTTP/2 settings, `100
    ///   Continue`, the first event of a stream. Nothing tells it from an answer, so it is in doubt.
    /// - On an old one the last data is the answer to the last request, if the protocol is HTTP/1. HTTP/2 answers one
    ///   request while another is under way, and a stream's pauses look like its end: this takes `idle_after`.
    pub fn is_idle(&self, connection: &Connection) -> bool {
        let traffic = connection.traffic;
        if connection.unread > 0 || traffic.unsent > 0 {
            return false;
        }
        let has_received = traffic.received > 0;
        if has_received && (traffic.segments_sent == 0 || traffic.received_ago < traffic.sent_ago) {
            return false;
        }
        let is_young = traffic.segments_received <= HANDSHAKE_SEGMENTS
            || traffic.segments_received <= SETTINGS_SEGMENTS
                && traffic.segments_sent < traffic.segments_received;
        let least = match has_received {
            false => FIRST_REQUEST_TIMEOUT,
            true if is_young && self.idle_after.is_none() => self.in_doubt,
            true => Duration::ZERO,
        };
        let quiet_for = if has_received { traffic.sent_ago } else { traffic.received_ago };
        quiet_for >= least.max(self.idle_after.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kernel::sockdiag::Traffic;

    const DRAIN: u64 = 10_000;

    /// Segments received and sent, and milliseconds since the last of each.
    fn connection(segments: (u32, u32), received_ago: u64, sent_ago: u64) -> Connection {
        let traffic = Traffic {
            sent_ago: Duration::from_millis(sent_ago),
            received_ago: Duration::from_millis(received_ago),
            unsent: 0,
            segments_received: segments.0,
            segments_sent: segments.1,
            received: segments.0.into(),
        };
        let (local, peer) = ("127.0.0.1:80".parse().unwrap(), "127.0.0.1:1".parse().unwrap());
        Connection { local, peer, opening: false, inode: 1, unread: 0, traffic }
    }

    fn rule(idle_after: Option<u64>) -> IdleRule {
        IdleRule::new(idle_after.map(Duration::from_millis), Duration::from_millis(DRAIN))
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
            assert_eq!(rule(None).is_idle(&connection), expected, "{what}");
        }
        let answered = connection((20, 20), 20, 10);
        assert!(!rule(None).is_idle(&Connection { unread: 1, ..answered }));
        let unsent = Traffic { unsent: 1, ..answered.traffic };
        assert!(!rule(None).is_idle(&Connection { traffic: unsent, ..answered }));
    }

    /// Measured on Linux 6.18 with Node, Python and curl.
    #[test]
    fn a_first_request_that_looks_answered_is_in_doubt_until_nothing_has_moved_for_as_long_as_a_drain() {
        let cases = [
            ("100 Continue was sent, the body waits", (1, 1), 116, 112),
            ("TLS 1.3, the first request is in flight", (2, 2), 416, 416),
            ("TLS 1.3, tickets were sent late", (2, 2), 416, 366),
            ("TLS 1.2, connected", (2, 2), 348, 348),
            ("HTTP/2, connected", (2, 2), 344, 344),
            ("HTTP/2, a fast request was answered, a slow one is in flight", (4, 3), 48, 24),
            ("a stream of events pauses", (1, 4), 1416, 400),
        ];
        for (what, segments, received_ago, sent_ago) in cases {
            assert!(!rule(None).is_idle(&connection(segments, received_ago, sent_ago)), "{what}");
            let later = DRAIN - sent_ago;
            let quiet = connection(segments, received_ago + later, sent_ago + later);
            assert!(rule(None).is_idle(&quiet), "{what}");
        }
    }

    #[test]
    fn a_time_that_was_asked_for_holds_for_every_connection_instead_of_doubt() {
        let old = |quiet| connection((40, 40), quiet + 20, quiet);
        let young = |quiet| connection((2, 2), quiet, quiet);
        for connection in [old, young] {
            assert!(
                !rule(Some(2000)).is_idle(&connection(1999)) && rule(Some(2000)).is_idle(&connection(2000))
            );
            assert!(rule(Some(0)).is_idle(&connection(0)));
        }
        let fresh = connection((0, 0), 1500, 1500);
        assert!(rule(Some(0)).is_idle(&fresh) && !rule(Some(2000)).is_idle(&fresh));
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
            prop_assert!(!rule(idle_after).is_idle(&now) || rule(idle_after).is_idle(&then));
        }

        #[test]
        fn a_connection_with_an_answer_to_come_is_never_idle(
            segments in (1_u32..30, 0_u32..30),
            received_ago in 0_u64..20_000,
            longer in 1_u64..20_000,
            idle_after in proptest::option::of(0_u64..20_000),
        ) {
            prop_assert!(!rule(idle_after).is_idle(&connection(segments, received_ago, received_ago + longer)));
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
            prop_assert!(!rule(Some(more)).is_idle(&connection) || rule(Some(less)).is_idle(&connection));
        }
    }
}
