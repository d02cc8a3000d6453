//! What a worker has to do before it gets a connection: one rule, for the first start, restarts, reloads and scalings.
//!
//! It has said or shown that it is ready, as `--ready` has it. And if it replaces another worker it listens on every
//! address that the other one had when its generation became ready and still has, and on one at least if the other one
//! listens anywhere. What the other one has opened later, a debugger's port for example, need not be opened: it is waited for
//! about as long as the other one took.

use std::time::{Duration, Instant};

use humantime::format_duration;

use super::endpoints::Endpoints;
use super::policy::{Policy, Readiness};
use super::worker::Worker;
use crate::address::{Address, Endpoint};
use crate::ids::WorkerId;
use crate::words::list;

/// What the replaced worker has opened later is waited for twice as long as that took, within these limits.
const LEAST_MOMENT: Duration = Duration::from_secs(1);
const LONGEST_MOMENT: Duration = Duration::from_secs(10);

/// What keeps a worker from being ready.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lack {
    /// It hasn't said that it is ready.
    Word,
    /// It hasn't lived long enough.
    Age,
    /// It listens nowhere.
    Listener,
    /// It listens only where processes that it starts may be the only clients.
    SharedListener,
    /// It doesn't listen where the worker that it replaces does.
    Endpoints(Vec<Endpoint>),
    /// It doesn't hold these UDP ports of the worker that it replaces, though it asked for them.
    UdpPorts(Vec<Address>),
    /// It hasn't answered a request.
    Answer,
    /// It may be about to listen where the worker that it replaces has begun to listen later, until then.
    Moment { until: Instant },
}

/// What a worker lacks; `None`: it is ready.
pub fn lack(
    id: WorkerId,
    worker: &Worker,
    policy: &Policy,
    endpoints: &Endpoints,
    slots: usize,
    now: Instant,
) -> Option<Lack> {
    let Worker { shown, ports_may_change, .. } = worker;
    // Nobody else has to have it, or yet.
    let suffices = |endpoint: &Endpoint| slots == 1 || *ports_may_change && endpoint.is_udp();
    let has_listener = endpoints.has_public(id) || shown.has_settled && endpoints.of(id).any(suffices);
    // One that has bound a UDP port may be about to listen.
    let shows_ready = has_listener && (shown.has_settled || endpoints.has_listener(id));
    let no_listener = || match endpoints.of(id).next() {
        None => Lack::Listener,
        Some(_) => Lack::SharedListener,
    };
    let lack = match policy.readiness {
        Readiness::Listen => (!shown.says_ready && !shows_ready).then(no_listener),
        Readiness::Notify => (!shown.says_ready).then_some(Lack::Word),
        Readiness::Alive(_) => (!shown.is_old_enough).then_some(Lack::Age),
        Readiness::Answers { .. } if shown.probed_at.is_none() => Some(no_listener()),
        Readiness::Answers { .. } => (!shown.has_answered).then_some(Lack::Answer),
    };
    if lack.is_some() {
        return lack;
    }
    let missing = if *ports_may_change { Vec::new() } else { endpoints.missing(id, worker.slot) };
    if !missing.is_empty() {
        return Some(Lack::Endpoints(missing));
    }
    if endpoints.are_expected(worker.slot, slots) && !has_listener {
        return Some(no_listener());
    }
    let after = endpoints.lacks_later(id, worker.slot).filter(|_| !ports_may_change)?;
    moment(worker, after, now)
}

/// What keeps a worker from being ready if it may yet open what the replaced one opened so long after its first listener.
pub fn moment(worker: &Worker, after: Duration, now: Instant) -> Option<Lack> {
    let until = worker.begun_to_listen() + (after * 2 + LEAST_MOMENT).min(LONGEST_MOMENT);
    (now < until).then_some(Lack::Moment { until })
}

/// Why a worker wasn't ready in time.
pub fn describe(lack: Option<Lack>, worker: &Worker, policy: &Policy) -> String {
    let timeout = format_duration(policy.ready_timeout);
    let shown = &worker.shown;
    if let (Some(Lack::Answer), Some(failure)) = (&lack, &shown.last_failure) {
        return format!("{worker} {failure}, and was not ready within {timeout} (see --ready-timeout)");
    }
    let lacks = match lack {
        Some(Lack::Word) => "it did not say that it is".to_owned(),
        Some(Lack::Listener) if shown.says_ready || shown.is_old_enough => {
            "it listens nowhere, while the worker that it replaces does".to_owned()
        }
        Some(Lack::Listener) => {
            "it listens on no TCP port or Unix socket that can be shared, and did not say that it is \
                                 ready (see --ready)"
                .to_owned()
        }
        Some(Lack::SharedListener) => {
            "it listens only on Unix sockets or UDP ports that no other worker has (see --ready notify)"
                .to_owned()
        }
        Some(Lack::Endpoints(missing)) => format!(
            "it does not listen on {}, as the worker that it replaces does (see reload --ports-may-change)",
            list(missing)
        ),
        Some(Lack::UdpPorts(refused)) => format!(
            "it could not bind {}, which the worker that it replaces holds (see reload --ports-may-change)",
            list(refused)
        ),
        Some(Lack::Answer) => "it answered no request".to_owned(),
        Some(Lack::Age | Lack::Moment { .. }) | None => "there was no time".to_owned(),
    };
    format!("{worker} was not ready within {timeout}: {lacks} (see --ready-timeout)")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Transport;
    use crate::fleet::policy::example;
    use crate::ids::SlotId;

    const OLD: WorkerId = WorkerId(0);
    const NEW: WorkerId = WorkerId(1);

    fn port(port: u16) -> Endpoint {
        Endpoint::Port(Address::new(([127, 0, 0, 1], port).into(), false, 0))
    }

    /// Endpoints of an old worker that listened on ports 1 and 2 when its generation became ready, and on 3 later, and of a
    /// new one.
    fn endpoints() -> Endpoints {
        let mut endpoints = Endpoints::default();
        for worker in [OLD, NEW] {
            endpoints.add_worker(worker);
        }
        for number in [1, 2] {
            endpoints.add(OLD, port(number), 2);
        }
        endpoints.require(OLD, SlotId(0));
        endpoints.add(OLD, port(3), 2);
        endpoints.add_later(SlotId(0), port(3), Duration::from_secs(2));
        endpoints
    }

    fn worker() -> Worker {
        Worker::new(NEW, SlotId(0), 2, Instant::now())
    }

    #[test]
    fn a_replacement_listens_where_its_predecessor_did_whatever_it_says() {
        let alive = Readiness::Alive(Duration::ZERO);
        let answers = Readiness::Answers { port: None };
        for readiness in [Readiness::Listen, Readiness::Notify, alive, answers] {
            let (mut endpoints, mut worker, policy) = (endpoints(), worker(), example(readiness));
            worker.shown.says_ready = true;
            worker.shown.is_old_enough = true;
            worker.shown.probed_at = Some(port(1));
            worker.shown.has_answered = true;
            let start = worker.started;
            let lack = |endpoints: &Endpoints, worker: &Worker, after| {
                lack(NEW, worker, &policy, endpoints, 2, start + Duration::from_secs(after))
            };
            assert_eq!(
                lack(&endpoints, &worker, 0),
                Some(Lack::Endpoints(vec![port(1), port(2)])),
                "{readiness:?}"
            );
            endpoints.add(NEW, port(1), 2);
            endpoints.add(NEW, port(2), 2);
            let until = start + Duration::from_secs(5);
            assert_eq!(lack(&endpoints, &worker, 4), Some(Lack::Moment { until }));
            assert_eq!(lack(&endpoints, &worker, 5), None, "what was opened later doesn't count");
        }
    }

    #[test]
    fn a_replacement_listens_somewhere_if_its_predecessor_does() {
        let mut endpoints = Endpoints::default();
        endpoints.add_worker(NEW);
        let (mut worker, policy) = (worker(), example(Readiness::Notify));
        worker.shown.says_ready = true;
        assert_eq!(lack(NEW, &worker, &policy, &endpoints, 2, worker.started), None, "it replaces nobody");
        endpoints.add_later(SlotId(0), port(1), Duration::ZERO);
        assert_eq!(lack(NEW, &worker, &policy, &endpoints, 2, worker.started), Some(Lack::Listener));
        endpoints.add(NEW, port(2), 2);
        let later = worker.started + LEAST_MOMENT;
        assert_eq!(lack(NEW, &worker, &policy, &endpoints, 2, later), None);
    }

    #[test]
    fn a_udp_server_is_ready_when_it_has_not_begun_to_listen_for_a_while() {
        let mut endpoints = Endpoints::default();
        endpoints.add_worker(NEW);
        let (mut worker, policy) = (worker(), example(Readiness::Listen));
        let lack =
            |endpoints: &Endpoints, worker: &Worker| lack(NEW, worker, &policy, endpoints, 2, worker.started);
        endpoints.add(
            NEW,
            Address::new(([127, 0, 0, 1], 53).into(), false, 0).over(Transport::Udp).into(),
            2,
        );
        assert_eq!(lack(&endpoints, &worker), Some(Lack::SharedListener));
        worker.shown.has_settled = true;
        assert_eq!(lack(&endpoints, &worker), None);
        worker.shown.has_settled = false;
        endpoints.add(NEW, port(53), 2);
        assert_eq!(lack(&endpoints, &worker), None, "it listens");
    }

    #[test]
    fn a_worker_whose_ports_may_change_may_be_the_first_at_one_of_udp() {
        let mut endpoints = Endpoints::default();
        endpoints.add_worker(NEW);
        let udp = Address::new(([127, 0, 0, 1], 5000).into(), false, 0).over(Transport::Udp);
        endpoints.add(NEW, udp.into(), 4);
        let (mut worker, policy) = (worker(), example(Readiness::Listen));
        worker.shown.has_settled = true;
        let lack = |worker: &Worker| lack(NEW, worker, &policy, &endpoints, 4, worker.started);
        assert_eq!(lack(&worker), Some(Lack::SharedListener));
        worker.ports_may_change = true;
        assert_eq!(lack(&worker), None);
    }

    #[test]
    fn a_worker_answers_a_request() {
        let mut endpoints = Endpoints::default();
        endpoints.add_worker(NEW);
        let policy = example(Readiness::Answers { port: None });
        let mut worker = worker();
        assert_eq!(lack(NEW, &worker, &policy, &endpoints, 2, worker.started), Some(Lack::Listener));
        endpoints.add(NEW, port(1), 2);
        worker.shown.probed_at = Some(port(1));
        assert_eq!(lack(NEW, &worker, &policy, &endpoints, 2, worker.started), Some(Lack::Answer));
        worker.shown.has_answered = true;
        assert_eq!(lack(NEW, &worker, &policy, &endpoints, 2, worker.started), None);
    }

    #[test]
    fn it_is_said_what_a_late_worker_lacks() {
        let (worker, policy) = (worker(), example(Readiness::Notify));
        let described = |lack, worker: &Worker| describe(Some(lack), worker, &policy);
        let text = described(Lack::Endpoints(vec![port(1)]), &worker);
        assert!(text.starts_with(
            "worker 0 (generation 2) was not ready within 1m: it does not listen on 127.0.0.1:1, as"
        ));
        for (lack, part) in [
            (Lack::Word, "it did not say that it is (see --ready-timeout)"),
            (Lack::Listener, "it listens on no TCP port or Unix socket"),
            (Lack::SharedListener, "it listens only on Unix sockets"),
            (Lack::Answer, "it answered no request"),
        ] {
            assert!(described(lack.clone(), &worker).contains(part), "{lack:?}");
        }
        let mut worker = worker;
        worker.shown.says_ready = true;
        assert!(
            described(Lack::Listener, &worker)
                .contains("it listens nowhere, while the worker that it replaces does")
        );
        worker.shown.last_failure = Some("answered GET /healthz with 503 Service Unavailable".to_owned());
        assert_eq!(
            described(Lack::Answer, &worker),
            "worker 0 (generation 2) answered GET /healthz with 503 Service Unavailable, and was not ready within 1m (see \
             --ready-timeout)"
        );
    }
}
