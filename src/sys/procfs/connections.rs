//! Connections of a network namespace, from `/proc/PID/net`.
//!
//! They are found by the inode of a socket; `descriptors` has the inodes of a process.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use super::handle::{Handle, MAX_TABLE_BYTES};

/// A socket with another end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Address and port of the other end.
    pub remote: String,
    /// A socket of the same network namespace listens on its own port.
    pub is_accepted: bool,
}

impl Handle {
    /// The connections in its network namespace, by the socket's inode.
    pub fn connections(&self) -> HashMap<u64, Connection> {
        let tables = ["net/tcp", "net/tcp6", "net/udp", "net/udp6"];
        let tables = tables.iter().filter_map(|table| self.read(table, MAX_TABLE_BYTES).ok());
        let sockets: Vec<Socket> = tables.flat_map(|table| parse_sockets(&table)).collect();
        let listening: HashSet<u16> =
            sockets.iter().filter(|socket| socket.listens).map(|socket| socket.port).collect();
        let connected = sockets.into_iter().filter_map(|socket| {
            let (remote, is_accepted) = (socket.remote?, listening.contains(&socket.port));
            Some((socket.inode, Connection { remote: remote.to_string(), is_accepted }))
        });
        connected.collect()
    }
}

/// A line of `/proc/PID/net/tcp` and the like.
#[derive(Debug, PartialEq, Eq)]
struct Socket {
    inode: u64,
    port: u16,
    listens: bool,
    remote: Option<SocketAddr>,
}

fn parse_sockets(table: &[u8]) -> Vec<Socket> {
    /// `TCP_LISTEN`; no socket of UDP is in this state.
    const LISTENS: &str = "0A";
    let lines = table.split(|&byte| byte == b'\n').skip(1);
    let parsed = lines.filter_map(|line| {
        let fields: Vec<&str> = str::from_utf8(line).ok()?.split_ascii_whitespace().collect();
        // sl local remote st queues timer retransmits uid timeout inode
        let (_, own) = fields.get(1)?.split_once(':')?;
        let (address, port) = fields.get(2)?.split_once(':')?;
        let port = u16::from_str_radix(port, 16).ok()?;
        let inode = fields.get(9)?.parse().ok().filter(|inode| *inode != 0)?;
        let words: Option<Vec<u32>> = (0..address.len() / 8)
            .map(|word| u32::from_str_radix(address.get(word * 8..word * 8 + 8)?, 16).ok())
            .collect();
        // The address is in network order; each word of it is printed in the machine's order.
        let bytes: Vec<u8> = words?.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let address: IpAddr = match bytes.len() {
            4 => <[u8; 4]>::try_from(bytes).ok()?.into(),
            16 => <[u8; 16]>::try_from(bytes).ok()?.into(),
            _ => return None,
        };
        Some(Socket {
            inode,
            port: u16::from_str_radix(own, 16).ok()?,
            listens: fields.get(3) == Some(&LISTENS),
            remote: (port != 0).then(|| SocketAddr::new(address.to_canonical(), port)),
        })
    });
    parsed.collect()
}

#[cfg(test)]
mod tests {
    use super::super::descriptors::Descriptor;
    use super::*;

    #[test]
    fn connections_are_read_from_the_kernels_tables() {
        let table = b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            \x20  0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1 0\n\
            \x20  1: 0100007F:A1B2 0100007F:115C 01 00000000:00000000 00:00000000 00000000     0        0 12 1 0\n";
        let read = |table: &[u8]| {
            let sockets = parse_sockets(table).into_iter();
            sockets
                .map(|Socket { inode, port, listens, remote }| {
                    (inode, port, listens, remote.map(|remote| remote.to_string()))
                })
                .collect::<Vec<_>>()
        };
        let to = |remote: &str| Some(remote.to_owned());
        let expected = [(11, 8080, true, None), (12, 0xa1b2, false, to("127.0.0.1:4444"))];
        assert_eq!(read(table), expected);
        let table = b"  sl  local_address remote_address st\n\
            \x20  0: 00000000000000000000000001000000:1 B80D0120000000000000000001000000:01BB 01 0:0 00:0 0 0 0 13 1\n\
            \x20  1: 0000000000000000FFFF00000100007F:1 0000000000000000FFFF00000100007F:115C 01 0:0 00:0 0 0 0 14 1\n";
        let expected =
            [(13, 1, false, to("[2001:db8::1]:443")), (14, 1, false, to("127.0.0.1:4444"))];
        assert_eq!(read(table), expected);
    }

    #[test]
    fn a_connection_of_our_own_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stream = std::net::TcpStream::connect(address).unwrap();
        let me = Handle::open(std::process::id()).unwrap();
        let number = u32::try_from(std::os::fd::AsRawFd::as_raw_fd(&stream)).unwrap();
        let Descriptor::Socket(inode) = me.descriptor(number).unwrap() else { panic!() };
        let expected = Connection { remote: address.to_string(), is_accepted: false };
        assert_eq!(me.connections().get(&inode), Some(&expected));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_sockets_or_none(table: Vec<u8>) {
            let _ = parse_sockets(&table);
        }
    }
}
