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

/// What the kernel's tables show of a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketEntry {
    /// `tcp`, `tcp6`, `udp`, `udp6` or `unix`.
    pub family: &'static str,
    /// Address and port; of a Unix socket, its name, as bytes.
    pub local: Vec<u8>,
    pub remote: Option<String>,
    pub listens: bool,
}

impl Handle {
    /// The sockets in its network namespace, by their inodes: of TCP, UDP, and of Unix.
    pub fn sockets(&self) -> HashMap<u64, SocketEntry> {
        let mut all = HashMap::new();
        for family in ["tcp", "tcp6", "udp", "udp6"] {
            let Ok(table) = self.read(&format!("net/{family}"), MAX_TABLE_BYTES) else { continue };
            all.extend(parse_sockets(&table).into_iter().map(|socket| {
                let local = socket.local.to_string().into_bytes();
                let remote = socket.remote.map(|remote| remote.to_string());
                (socket.inode, SocketEntry { family, local, remote, listens: socket.listens })
            }));
        }
        if let Ok(table) = self.read("net/unix", MAX_TABLE_BYTES) {
            all.extend(parse_unix(&table));
        }
        all
    }
}

/// The lines of `/proc/PID/net/unix`. A name can have any bytes but a line break, which the
/// kernel does not escape: what follows it is no line of this form.
fn parse_unix(table: &[u8]) -> Vec<(u64, SocketEntry)> {
    /// `__SO_ACCEPTCON`.
    const LISTENS: u32 = 0x10000;
    let parsed = table.split(|&byte| byte == b'\n').skip(1).filter_map(|line| {
        // Num RefCount Protocol Flags Type St Inode Path
        let mut fields = line.splitn(8, |&byte| byte == b' ').skip(3);
        let mut text = || str::from_utf8(fields.next()?).ok();
        let flags = u32::from_str_radix(text()?, 16).ok()?;
        let (_kind, _state) = (text()?, text()?);
        // The inode is padded to the right of its column.
        let rest = line.splitn(7, |&byte| byte == b' ').nth(6)?.trim_ascii_start();
        let end = rest.iter().position(|&byte| byte == b' ').unwrap_or(rest.len());
        let inode = str::from_utf8(&rest[..end]).ok()?.parse().ok()?;
        let local = rest.get(end + 1..).unwrap_or_default().to_vec();
        let listens = flags & LISTENS != 0;
        Some((inode, SocketEntry { family: "unix", local, remote: None, listens }))
    });
    parsed.collect()
}

/// A line of `/proc/PID/net/tcp` and the like.
#[derive(Debug, PartialEq, Eq)]
struct Socket {
    inode: u64,
    local: SocketAddr,
    port: u16,
    listens: bool,
    remote: Option<SocketAddr>,
}

/// An address and a port as these tables write them.
fn parse_address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
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
    Some(SocketAddr::new(address.to_canonical(), port))
}

fn parse_sockets(table: &[u8]) -> Vec<Socket> {
    /// `TCP_LISTEN`; no socket of UDP is in this state.
    const LISTENS: &str = "0A";
    let lines = table.split(|&byte| byte == b'\n').skip(1);
    let parsed = lines.filter_map(|line| {
        let fields: Vec<&str> = str::from_utf8(line).ok()?.split_ascii_whitespace().collect();
        // sl local remote st queues timer retransmits uid timeout inode
        let (local, remote) = (parse_address(fields.get(1)?)?, parse_address(fields.get(2)?)?);
        let inode = fields.get(9)?.parse().ok().filter(|inode| *inode != 0)?;
        Some(Socket {
            inode,
            local,
            port: local.port(),
            listens: fields.get(3) == Some(&LISTENS),
            remote: (remote.port() != 0).then_some(remote),
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
                .map(|Socket { inode, port, listens, remote, .. }| {
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

    #[test]
    fn sockets_of_unix_are_read_by_their_names() {
        let table = b"Num       RefCount Protocol Flags    Type St Inode Path\n\
            ffff: 00000002 00000000 00010000 0001 01 2001 /run/a b.sock\n\
            ffff: 00000003 00000000 00000000 0001 03  2002 @hidden\n\
            ffff: 00000003 00000000 00000000 0001 03 2003\n";
        let entry = |local: &[u8], listens| SocketEntry {
            family: "unix",
            local: local.to_vec(),
            remote: None,
            listens,
        };
        let expected = [
            (2001, entry(b"/run/a b.sock", true)),
            (2002, entry(b"@hidden", false)),
            (2003, entry(b"", false)),
        ];
        assert_eq!(parse_unix(table), expected);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_sockets_or_none(table: Vec<u8>) {
            let _ = (parse_sockets(&table), parse_unix(&table));
        }
    }
}
