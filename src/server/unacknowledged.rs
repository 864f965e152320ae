//! Connections that have ended normally, but whose last bytes or end (FIN) the client has not acknowledged.
//!
//! The kernel keeps sending both after the process has exited, unless the network namespace is removed with the
//! process, as the namespace of a pod or a container is. The client would then get neither the rest nor a reset, and
//! would wait for its own timeout.

use std::collections::HashSet;
use std::fs;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::fs::fstat;
use socket2::SockRef;

/// The kernel's tables of the TCP sockets in the network namespace of the process (proc(5), `/proc/net/tcp`). Inherited
/// sockets of another namespace are not in them, but that namespace outlives the process.
const TABLES: [&str; 2] = ["/proc/self/net/tcp", "/proc/self/net/tcp6"];

/// FIN_WAIT1, LAST_ACK and CLOSING (the kernel's include/net/tcp_states.h): the client has not acknowledged the end,
/// and maybe not the bytes before it.
const UNACKNOWLEDGED_STATES: [&str; 3] = ["04", "09", "0B"];

/// Descriptors of connections that have ended since the drain began. Their sending side is shut down: they only have to
/// be closed or reset.
#[derive(Debug, Default)]
pub(crate) struct EndedConnections(Mutex<Vec<OwnedFd>>);

impl EndedConnections {
    /// Keeps the descriptor of an ended connection.
    pub(crate) fn add(&self, connection: OwnedFd) {
        self.lock().push(connection);
    }

    /// Closes the connections that are not in `sockets`, and returns how many are left.
    pub(crate) fn close_acknowledged(&self, sockets: &UnacknowledgedSockets) -> usize {
        let mut connections = self.lock();
        connections
            .retain(|connection| fstat(connection).is_ok_and(|found| sockets.inodes.contains(&found.st_ino)));
        connections.len()
    }

    /// Resets all connections.
    pub(crate) fn reset(&self) {
        for connection in self.lock().drain(..) {
            let _ = SockRef::from(&connection).set_linger(Some(Duration::ZERO)); // socket(7), tcp(7)
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<OwnedFd>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner) // no code under the lock can panic
    }
}

/// The sockets that are shut down and whose end the client has not acknowledged.
#[derive(Debug, Default)]
pub(crate) struct UnacknowledgedSockets {
    /// The inodes of sockets with a descriptor.
    inodes: HashSet<u64>,
    /// The local and remote addresses of sockets without one, which can no longer be reset. It is a set since the
    /// kernel may list a socket twice when others are added meanwhile.
    orphans: HashSet<(String, String)>,
}

impl UnacknowledgedSockets {
    /// How many sockets have no descriptor.
    pub(crate) fn orphans(&self) -> usize {
        self.orphans.len()
    }

    /// Reads the kernel's tables. A socket without a descriptor counts only if its local port is one of `ports`. Finds
    /// none if the tables can't be read.
    pub(crate) fn read(ports: &[u16]) -> Self {
        let mut sockets = Self::default();
        for table in TABLES {
            sockets.add_table(&fs::read_to_string(table).unwrap_or_default(), ports);
        }
        sockets
    }

    fn add_table(&mut self, table: &str, ports: &[u16]) {
        for line in table.lines() {
            let mut columns = line.split_ascii_whitespace();
            let (Some(local), Some(remote), Some(state)) = (columns.nth(1), columns.next(), columns.next())
            else {
                continue;
            };
            let Some(inode) = columns.nth(5).filter(|_| UNACKNOWLEDGED_STATES.contains(&state)) else {
                continue;
            };
            let port = local.rsplit(':').next().and_then(|port| u16::from_str_radix(port, 16).ok());
            match inode.parse() {
                Ok(0) if port.is_some_and(|port| ports.contains(&port)) => {
                    self.orphans.insert((local.to_owned(), remote.to_owned()));
                }
                Ok(0) | Err(_) => {}
                Ok(inode) => _ = self.inodes.insert(inode),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::time::Instant;

    /// As Linux 6.18 prints it.
    const TABLE: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:0463 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 6001 1 0000 100 0 0 10 0
   1: 0109090A:0463 0209090A:E104 04 0001384C:00000000 04:00000C3A 00000000     0        0 0 3 0000 20 4 30 94 -1
   2: 0109090A:0463 0209090A:E105 04 00000001:00000000 01:00000014 00000000     0        0 6002 2 0000 20 4 30 10 -1
   3: 0109090A:1F40 0209090A:E106 0B 00000001:00000000 01:00000014 00000000     0        0 0 2 0000 20 4 30 10 -1
   4: 0109090A:0463 0209090A:E107 05 00000000:00000000 00:00000000 00000000     0        0 6003 1 0000 20 4 30 10 -1
   5: 0109090A:0463 0209090A:E108 06 00000000:00000000 03:00001682 00000000     0        0 0 3 0000
   6: 0109090A:0463 0209090A:E109 09 00000001:00000000 01:00000014 00000000     0        0 6004 2 0000 20 4 30 10 -1
   7: 0109090A:0463 0209090A:E10A 01 00000064:00000000 01:00000014 00000000     0        0 6005 2 0000 20 4 30 10 -1
";

    #[test]
    fn sockets_without_a_descriptor_are_found_by_port() {
        for (ports, orphans) in [(&[][..], 0), (&[1123], 1), (&[1123, 8000], 2)] {
            let mut sockets = UnacknowledgedSockets::default();
            sockets.add_table(TABLE, ports);
            assert_eq!(
                (sockets.orphans(), &sockets.inodes),
                (orphans, &HashSet::from([6002, 6004])),
                "{ports:?}"
            );
            let once = sockets.orphans.clone();
            sockets.add_table(TABLE, ports);
            assert_eq!(sockets.orphans, once, "listed twice, counted once");
        }
    }

    /// Waits until `count` is 0: the kernel acknowledges the end a moment after the client has read it.
    fn wait_for_none(count: impl Fn() -> usize) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while count() > 0 {
            assert!(Instant::now() < deadline, "{} not acknowledged after a minute", count());
            std::thread::yield_now();
        }
    }

    /// The descriptor of an ended connection, its client, and how many bytes were sent: more than fit into the receive
    /// buffer of the client, which has read none.
    fn ended(listener: &TcpListener) -> (OwnedFd, TcpStream, usize) {
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        SockRef::from(&server).set_send_buffer_size(1024 * 1024).unwrap();
        server.set_nonblocking(true).unwrap();
        let mut sent = 0;
        while let Ok(count) = server.write(&[0; 64 * 1024]) {
            sent += count;
        }
        let descriptor = server.as_fd().try_clone_to_owned().unwrap();
        server.shutdown(Shutdown::Write).unwrap();
        (descriptor, client, sent)
    }

    #[test]
    fn a_connection_is_kept_until_its_client_has_everything() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connections = EndedConnections::default();
        let (descriptor, mut client, sent) = ended(&listener);
        connections.add(descriptor);
        assert_eq!(connections.close_acknowledged(&UnacknowledgedSockets::read(&[])), 1);
        assert_eq!(client.read_to_end(&mut Vec::new()).unwrap(), sent);
        // The client keeps its own side open, which does not matter.
        wait_for_none(|| connections.close_acknowledged(&UnacknowledgedSockets::read(&[])));
    }

    #[test]
    fn a_reset_reaches_a_client_that_has_read_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connections = EndedConnections::default();
        let (descriptor, mut client, sent) = ended(&listener);
        connections.add(descriptor);
        connections.reset();
        let mut received = Vec::new();
        let error = client.read_to_end(&mut received).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
        assert!(received.len() < sent);
    }

    #[test]
    fn a_closed_connection_is_found_by_its_port() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ports = [listener.local_addr().unwrap().port()];
        let orphans = || UnacknowledgedSockets::read(&ports).orphans();
        wait_for_none(orphans); // left by a process that had the port before
        let (descriptor, mut client, _) = ended(&listener);
        drop(descriptor);
        assert_eq!(orphans(), 1);
        client.read_to_end(&mut Vec::new()).unwrap();
        wait_for_none(orphans);
    }
}
