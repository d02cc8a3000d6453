//! A strict client of servers of UDP.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::wait::{DEADLINE, wait_until};

/// A query without an answer after this time is lost. Only a worker that is stopped answers later.
const LOST_AFTER: Duration = Duration::from_secs(20);

/// Who has answered what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub pid: u32,
    pub generation: u32,
    pub slot: u32,
    pub text: String,
}

impl Answer {
    #[track_caller]
    pub fn parse(answer: &[u8]) -> Answer {
        let answer = String::from_utf8_lossy(answer).into_owned();
        let mut words = answer.splitn(4, ' ');
        let mut number = |name: &str| {
            let value = words.next().and_then(|word| word.strip_prefix(name));
            value.and_then(|value| value.parse().ok()).unwrap_or_else(|| panic!("no {name} in {answer:?}"))
        };
        let (pid, generation, slot) = (number("pid="), number("generation="), number("slot="));
        Answer { pid, generation, slot, text: words.next().unwrap_or_default().to_owned() }
    }
}

/// One flow: the datagrams between a port of ours and the server.
pub struct Flow(pub UdpSocket);

impl Flow {
    pub fn to(server: SocketAddr) -> Flow {
        let own: IpAddr =
            if server.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
        let socket = UdpSocket::bind((own, 0)).expect("a socket");
        socket.connect(server).expect("connect it");
        socket.set_read_timeout(Some(LOST_AFTER)).expect("a time-out");
        Flow(socket)
    }

    pub fn say(&self, text: &str) {
        self.0.send(text.as_bytes()).expect("send a query");
    }

    /// The next answer; `None` if there is none.
    pub fn hear(&self) -> Option<Answer> {
        let mut answer = [0; 2048];
        let len = self.0.recv(&mut answer).ok()?;
        Some(Answer::parse(&answer[..len]))
    }

    pub fn ask(&self, text: &str) -> Option<Answer> {
        self.say(text);
        self.hear()
    }

    /// Whether nothing comes for a while.
    pub fn is_silent(&self) -> bool {
        self.0.set_read_timeout(Some(Duration::from_millis(300))).expect("a time-out");
        let silent = self.hear().is_none();
        self.0.set_read_timeout(Some(LOST_AFTER)).expect("a time-out");
        silent
    }
}

#[track_caller]
pub fn ask(flow: &Flow, text: &str) -> Answer {
    flow.ask(text).unwrap_or_else(|| panic!("{text:?} was not answered"))
}

pub fn flows(server: SocketAddr, count: usize) -> Vec<Flow> {
    (0..count).map(|_| Flow::to(server)).collect()
}

#[track_caller]
pub fn workers_of(flows: &[Flow]) -> Vec<Answer> {
    flows.iter().map(|flow| ask(flow, "who")).collect()
}

/// Flows that ask all the time.
pub struct FlowLoad {
    end: Arc<AtomicBool>,
    answers: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Vec<Told>>>,
}

/// What a flow was told: the processes that have answered it, one after the other, and how many queries were lost.
#[derive(Debug, Default, Clone)]
pub struct Told {
    pub pids: Vec<u32>,
    pub lost: usize,
}

impl FlowLoad {
    pub fn start(server: SocketAddr, flows_of_each: usize, threads: usize) -> FlowLoad {
        let (end, answers) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let one = |_| {
            let (end, answers) = (Arc::clone(&end), Arc::clone(&answers));
            let flows = flows(server, flows_of_each);
            thread::spawn(move || {
                let mut told = vec![Told::default(); flows.len()];
                while !end.load(Ordering::Relaxed) {
                    flows.iter().for_each(|flow| flow.say("load"));
                    for (flow, told) in flows.iter().zip(&mut told) {
                        match flow.hear() {
                            Some(answer) if told.pids.last() == Some(&answer.pid) => {}
                            Some(answer) => told.pids.push(answer.pid),
                            None => told.lost += 1,
                        }
                        answers.fetch_add(1, Ordering::Relaxed);
                    }
                }
                told
            })
        };
        FlowLoad { threads: (0..threads).map(one).collect(), end, answers }
    }

    #[track_caller]
    pub fn wait_for_more(&self) {
        let before = self.answers.load(Ordering::Relaxed);
        wait_until("more answers", DEADLINE, || self.answers.load(Ordering::Relaxed) > before + 1000);
    }

    /// What each flow was told. Nothing was lost.
    #[track_caller]
    pub fn stop(self) -> Vec<Told> {
        self.end.store(true, Ordering::Relaxed);
        let told: Vec<Told> =
            self.threads.into_iter().flat_map(|thread| thread.join().expect("the load")).collect();
        let lost: usize = told.iter().map(|told| told.lost).sum();
        assert_eq!(lost, 0, "of {} queries", self.answers.load(Ordering::Relaxed));
        told
    }
}
