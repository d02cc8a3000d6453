//! Connections that no worker has accepted yet when reuse-run is stopped.

use nix::sys::signal::Signal;

use crate::clients::CLIENTS;
use crate::common::{Folder, Service, Waiting, begin, free_address};

#[test]
fn connections_that_wait_to_be_accepted_at_a_stop_are_served() {
    for by_command in [false, true] {
        let (addr, folder) = (free_address(), Folder::new());
        let command = folder.server(addr, &["--deaf-while", &folder.path("deaf")]);
        folder.raise("deaf");
        let mut service = Service::run_ready("-n 2", &command);
        let clients: Vec<Waiting> = (0..CLIENTS).map(|_| Waiting::new(addr)).collect();
        let stop = by_command.then(|| begin(&service, "stop"));
        if !by_command {
            service.signal(Signal::SIGTERM);
        }
        service.wait_for_line("stopping 2 workers");
        assert!(clients.iter().all(Waiting::waits));
        folder.lower("deaf");
        for client in clients {
            client.outcome().unwrap_or_else(|error| panic!("by command {by_command}: {error}"));
        }
        assert_eq!(service.wait_end().code(), Some(0));
        drop(stop);
    }
}
