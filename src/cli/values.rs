//! The values of options: how they are written, and what is wrong with one.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::address::{Address, Transport};
use crate::fleet::Readiness;
use crate::fleet::policy::{MAX_DURATION, MAX_WORKERS};
use crate::kernel::procfs;
use crate::operate::find::Which;
use crate::operate::protocol::{Name, Target};
use crate::steering::load::Balancing;

/// A number of workers, or `max`: as many as there are CPUs that this process may use.
#[derive(Debug, PartialEq)]
pub struct Workers(pub u32);

impl FromStr for Workers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "max" {
            // std takes the CPU affinity and the cgroup's quota into account.
            let usable = std::thread::available_parallelism().map_err(|error| error.to_string())?;
            return Ok(Self(u32::try_from(usable.get()).unwrap_or(u32::MAX)));
        }
        match text.parse() {
            Ok(count) if (1..=MAX_WORKERS).contains(&count) => Ok(Self(count)),
            _ => Err(format!("{text:?} is neither a number of workers from 1 to {MAX_WORKERS} nor max")),
        }
    }
}

impl FromStr for Balancing {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "load" => Ok(Self::Load),
            "random" => Ok(Self::Random),
            "queue" => Ok(Self::Queue),
            "client" => Ok(Self::Client),
            _ => Err(format!("{text:?} is none of load, random, queue and client")),
        }
    }
}

impl FromStr for Name {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let why = || {
            format!(
                "{text:?} is not a name: a letter, then letters, digits, \"-\", \"_\" and \".\", 32 at most"
            )
        };
        Self::new(text).ok_or_else(why)
    }
}

impl FromStr for Which {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let pid = text.parse().map(Self::Pid).ok();
        let which = pid.or_else(|| Name::new(text).map(Self::Name));
        which.ok_or_else(|| format!("{text:?} is neither a PID nor a name"))
    }
}

/// From "3000", ":3000", "127.0.0.1:3000" or `[::]:3000`, behind "udp:" for UDP. A port alone means all addresses of both
/// families, or of IPv4 if the kernel has no IPv6.
impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (rest, transport) = match text.strip_prefix("udp:") {
            Some(rest) => (rest, Transport::Udp),
            None => (text, Transport::Tcp),
        };
        let port = rest.strip_prefix(':').unwrap_or(rest).parse::<u16>().ok();
        let everywhere: IpAddr = match procfs::has_ipv6() {
            true => Ipv6Addr::UNSPECIFIED.into(),
            false => Ipv4Addr::UNSPECIFIED.into(),
        };
        match port.map(|port| SocketAddr::new(everywhere, port)).or_else(|| rest.parse().ok()) {
            Some(socket) if socket.port() != 0 => Ok(Self::new(socket, false, 0).over(transport)),
            _ => Err(format!(
                "{text:?} is not an address such as 3000, 127.0.0.1:3000, [::1]:3000 or udp:3000"
            )),
        }
    }
}

/// A number with or without "%". The limits are those of [`crate::fleet::Rollout::canary`].
#[derive(Debug, PartialEq)]
pub struct Percent(pub f64);

impl FromStr for Percent {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let percent = text.trim_end_matches('%').parse();
        percent.map(Self).map_err(|_| format!("{text:?} is not a number of percent such as 5 or 0.5"))
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let word = text.trim_start();
        let (sign, number) = word.split_at(word.find(|c: char| c.is_ascii_digit()).unwrap_or(0));
        match (sign, number.parse().ok().filter(|number| (1..=MAX_WORKERS).contains(number))) {
            ("", Some(number)) => Ok(Self::Exactly(number)),
            ("+", Some(number)) => Ok(Self::More(number)),
            ("-", Some(number)) => Ok(Self::Fewer(number)),
            _ => Err(format!("{text:?} is not a number of workers such as 4, +1 or -1")),
        }
    }
}

/// A duration of at most [`MAX_DURATION`].
#[derive(Debug, PartialEq)]
pub struct Period(pub Duration);

impl FromStr for Period {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match humantime::parse_duration(text) {
            Ok(duration) if duration > MAX_DURATION => Err(format!("{text:?} is longer than a year")),
            Ok(duration) => Ok(Self(duration)),
            Err(error) => Err(format!("{text:?} is not a duration such as 500ms, 10s or 2m: {error}")),
        }
    }
}

/// An amount of memory, in KiB.
#[derive(Debug, PartialEq)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let upper = text.to_ascii_uppercase();
        let word = upper.trim_end_matches("IB").trim_end_matches('B');
        let units = [("K", 1), ("M", 1024), ("G", 1024 * 1024)];
        let size = units.iter().find_map(|(unit, kib)| {
            let number: u64 = word.strip_suffix(unit)?.trim_end().parse().ok()?;
            number.checked_mul(*kib).filter(|size| *size > 0)
        });
        size.map(Self)
            .ok_or_else(|| format!("{text:?} is not an amount of memory in K, M or G such as 500M or 2G"))
    }
}

/// A duration of at least a second, for what should not happen again and again.
#[derive(Debug, PartialEq)]
pub struct Patience(pub Duration);

impl FromStr for Patience {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Period(duration) = text.parse()?;
        match duration < Duration::from_secs(1) {
            true => Err(format!("{text:?} is shorter than a second")),
            false => Ok(Self(duration)),
        }
    }
}

/// When a worker is ready, and what it is asked for if it has to answer requests.
#[derive(Debug, PartialEq)]
pub struct Ready {
    pub readiness: Readiness,
    pub path: Option<String>,
}

impl FromStr for Ready {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let readiness = match text {
            "listen" => Readiness::Listen,
            "notify" => Readiness::Notify,
            _ if text.starts_with(['/', ':']) => return Self::with_path(text),
            _ => match text.parse() {
                Ok(Period(duration)) => Readiness::Alive(duration),
                Err(_) => {
                    return Err(format!(
                        "{text:?} is neither listen nor notify, nor a duration such as 2s, nor a path such as /healthz"
                    ));
                }
            },
        };
        Ok(Self { readiness, path: None })
    }
}

impl Ready {
    /// From "/path" or ":PORT/path".
    fn with_path(text: &str) -> Result<Self, String> {
        const MAX_PATH: usize = 1000;
        let (port, path) = text.split_at(text.find('/').unwrap_or(text.len()));
        let number = port.strip_prefix(':').map(|number| number.parse::<u16>().unwrap_or(0));
        if number == Some(0) || path.is_empty() {
            return Err(format!("{text:?} is not a path with its port such as :3000/healthz"));
        }
        if !path.bytes().all(|byte| byte.is_ascii_graphic()) || path.len() > MAX_PATH {
            return Err(format!(
                "{text:?} is not a path of at most 1000 printable ASCII characters without spaces"
            ));
        }
        Ok(Self { readiness: Readiness::Answers { port: number }, path: Some(path.to_owned()) })
    }
}

/// A signal that can tell a worker to stop: by name, with or without SIG, or by number.
#[derive(Debug, PartialEq)]
pub struct StopSignal(pub Signal);

impl FromStr for StopSignal {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = text.to_uppercase();
        let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
        let numbered = || text.parse::<i32>().ok().and_then(|number| Signal::try_from(number).ok());
        match Signal::from_str(&name).ok().or_else(numbered) {
            Some(Signal::SIGSTOP | Signal::SIGCONT | Signal::SIGCHLD) | None => {
                Err(format!("{text:?} is not a signal that a worker can take, such as INT, TERM or USR2"))
            }
            Some(signal) => Ok(Self(signal)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Debug;

    use super::*;

    #[track_caller]
    fn assert_all<T: FromStr<Err = String> + PartialEq + Debug>(right: &[(&str, T)], wrong: &[&str]) {
        for (text, value) in right {
            assert_eq!(text.parse().as_ref(), Ok(value), "{text:?}");
        }
        for text in wrong {
            let error = text.parse::<T>().unwrap_err();
            assert!(error.starts_with(&format!("{text:?} is ")), "{text:?}: {error}");
        }
    }

    #[test]
    fn an_address_may_be_a_port_alone() {
        let address = |text: &str| Address::new(text.parse().unwrap(), false, 0);
        for text in ["3000", ":3000", "[::]:3000"] {
            assert_eq!(text.parse(), Ok(address("[::]:3000")), "{text}");
        }
        assert_eq!("127.0.0.1:3000".parse(), Ok(address("127.0.0.1:3000")));
        let udp = |text| address(text).over(Transport::Udp);
        assert_eq!("udp:127.0.0.1:53".parse(), Ok(udp("127.0.0.1:53")));
        assert_eq!("udp:53".parse(), Ok(udp("[::]:53")));
        for text in ["", "0", ":0", "localhost:3000", "127.0.0.1", "[::1]", "70000", "udp:", "tcp:53"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_number_of_workers_is_from_1_to_65535() {
        assert_all(&[("1", Workers(1)), ("65535", Workers(65_535))], &["0", "65536", "-1", "", "Max"]);
        assert!("max".parse::<Workers>().unwrap().0 >= 1);
    }

    #[test]
    fn a_share_is_a_number_with_or_without_a_percent_sign() {
        assert_all(&[("5", Percent(5.0)), ("99.99%", Percent(99.99))], &["", "half", "%", "5 %"]);
    }

    #[test]
    fn a_target_is_a_number_of_workers_or_a_signed_difference() {
        let right = [("4", Target::Exactly(4)), ("+1", Target::More(1)), ("-65535", Target::Fewer(65_535))];
        assert_all(&right, &["0", "+0", "--1", "65536", "", "1x", "+", "x1"]);
    }

    #[test]
    fn a_duration_has_a_unit_and_is_at_most_a_year() {
        let right = [("250ms", Duration::from_millis(250)), ("1m 30s", Duration::from_secs(90))];
        assert_all(&right.map(|(text, duration)| (text, Period(duration))), &["10", "2years", "", "-1s"]);
        assert_all(&[("365d", Period(MAX_DURATION))], &["366d"]);
    }

    #[test]
    fn readiness_is_listen_or_notify_or_a_duration_or_a_path() {
        let alive = Readiness::Alive(Duration::from_secs(2));
        let ready = |readiness, path: Option<&str>| Ready { readiness, path: path.map(str::to_owned) };
        let right = [
            ("listen", ready(Readiness::Listen, None)),
            ("notify", ready(Readiness::Notify, None)),
            ("2s", ready(alive, None)),
            ("/", ready(Readiness::Answers { port: None }, Some("/"))),
            ("/a?b=c:d", ready(Readiness::Answers { port: None }, Some("/a?b=c:d"))),
            (":9000/healthz", ready(Readiness::Answers { port: Some(9000) }, Some("/healthz"))),
        ];
        let long = format!("/{}", "x".repeat(1000));
        let wrong =
            ["soon", "2", "", ":9000", ":0/a", ":70000/a", ":/a", ":x/a", "/a b", "/ä", "/\r\nX: y", &long];
        assert_all(&right, &wrong);
    }

    #[test]
    fn a_stop_signal_is_a_name_or_a_number_of_a_signal_that_can_stop() {
        let right = ["TERM", "sigterm", "15"].map(|text| (text, StopSignal(Signal::SIGTERM)));
        assert_all(&right, &["STOP", "SIGCONT", "17", "99", "", "stop now"]);
    }

    #[test]
    fn an_amount_of_memory_has_a_unit() {
        let right =
            [("500M", Size(512_000)), ("2g", Size(2 << 20)), ("64 KiB", Size(64)), ("3MB", Size(3072))];
        assert_all(&right, &["", "500", "0M", "1.5G", "-1M", "1T", "M", "99999999999999999999G"]);
    }

    #[test]
    fn what_should_not_happen_again_and_again_takes_a_second() {
        assert_all(&[("1s", Patience(Duration::from_secs(1)))], &["0s", "999ms", "x"]);
    }

    mod fuzz {
        use proptest::prelude::*;

        use super::*;

        /// What is wrong is named on one line, and what is right is within its limits.
        fn check<T: FromStr<Err = String>>(
            text: &str,
            is_right: impl Fn(T) -> bool,
        ) -> Result<(), TestCaseError> {
            match text.parse::<T>() {
                Ok(value) => prop_assert!(is_right(value), "{text:?}"),
                Err(why) => {
                    prop_assert!(why.starts_with(&format!("{text:?} is ")), "{why}");
                    prop_assert!(!why.contains(char::is_control), "{why:?}");
                }
            }
            Ok(())
        }

        proptest! {
            #[test]
            fn every_text_is_a_value_within_its_limits_or_is_refused_by_name(
                text in prop_oneof!["[-+]?[0-9]{1,12}[a-z%]{0,3}", "[:/a-zA-Z0-9 .%]{0,12}", any::<String>()]
            ) {
                let is_count = |count| (1..=MAX_WORKERS).contains(&count);
                check(&text, |Workers(count)| is_count(count) || text == "max")?;
                check(&text, |target: Target| match target {
                    Target::Exactly(count) | Target::More(count) | Target::Fewer(count) => is_count(count),
                })?;
                check(&text, |address: Address| address.socket.port() != 0)?;
                check(&text, |Period(duration)| duration <= MAX_DURATION)?;
                check(&text, |_: Percent| true)?;
                check(&text, |_: Balancing| ["load", "random", "queue", "client"].contains(&text.as_str()))?;
                check(&text, |StopSignal(signal)| ![Signal::SIGSTOP, Signal::SIGCONT, Signal::SIGCHLD].contains(&signal))?;
                check(&text, |ready: Ready| ready.path.is_none_or(|path| {
                    path.starts_with('/') && path.len() <= 1000 && path.bytes().all(|byte| byte.is_ascii_graphic())
                }))?;
            }

            #[test]
            fn numbers_are_read_as_they_were_written(count in 1..=MAX_WORKERS, port in 1u16.., percent: f32, ms: u32) {
                prop_assert_eq!(count.to_string().parse(), Ok(Workers(count)));
                prop_assert_eq!(format!("+{count}").parse(), Ok(Target::More(count)));
                prop_assert_eq!(format!("-{count}").parse(), Ok(Target::Fewer(count)));
                prop_assert_eq!(port.to_string().parse::<Address>().map(|address| address.socket.port()), Ok(port));
                let share = percent.to_string().parse::<f64>().unwrap();
                prop_assert_eq!(format!("{percent}%").parse(), Ok(Percent(share)));
                prop_assert_eq!(format!("{ms}ms").parse(), Ok(Period(Duration::from_millis(ms.into()))));
            }
        }
    }
}
