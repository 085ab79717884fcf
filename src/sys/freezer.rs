//! Control groups that freeze their processes: the unified hierarchy's `cgroup.freeze`, and
//! the freezer of cgroup v1.
//!
//! A path from /proc/PID/cgroup is a name that the container may have chosen in part. It is
//! opened below the hierarchy's mount, through no link and onto no other mount. What is
//! opened stays that group, also when another one gets its name.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;

use rustix::fs::OFlags;

use super::file;
use super::procfs::Handle;

/// Groups of one container, from its own down to that of its init, that are looked at.
const MOST_LEVELS: usize = 32;

/// What the processes of a container do, from the least still on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stillness {
    Running,
    /// A group above the container's is frozen, and the container's with it.
    FrozenFromAbove,
    /// Freezing was ordered. A process that waits in the kernel stands still when it
    /// returns from there.
    Freezing,
    Frozen,
}

impl Stillness {
    /// Whether the container's own group was ordered to freeze.
    pub fn is_ordered(self) -> bool {
        matches!(self, Stillness::Freezing | Stillness::Frozen)
    }
}

/// The hierarchies of control groups that can freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hierarchy {
    Unified,
    /// Of cgroup v1.
    Freezer,
}

/// The groups of a container that can freeze.
#[derive(Debug)]
pub struct Freezers {
    groups: Vec<Group>,
}

#[derive(Debug)]
struct Group {
    hierarchy: Hierarchy,
    directory: OwnedFd,
    /// The container's own, which holds all its others.
    is_outermost: bool,
}

impl Freezers {
    /// Those of the container whose init this is. `own` finds how long the path of the
    /// container's own group is in that of its init. An error if there is none: then no
    /// group may be touched.
    pub fn of(init: &Handle, own: impl Fn(&[u8]) -> Option<usize>) -> io::Result<Freezers> {
        let membership = init.groups()?;
        let mountinfo = Handle::open(std::process::id())?.mountinfo()?;
        let mut groups = Vec::new();
        for (hierarchy, path) in paths(&membership) {
            let (Some(mount), Some(own)) = (mount_of(&mountinfo, hierarchy), own(path)) else {
                continue;
            };
            let mount = file::open_directory(&mount[..])?;
            let ends = (own..path.len()).filter(|&end| path[end] == b'/').chain([path.len()]);
            for (level, end) in ends.take(MOST_LEVELS).enumerate() {
                let directory = file::open_directory_beneath(&mount, &path[1..end])?;
                groups.push(Group { hierarchy, directory, is_outermost: level == 0 });
            }
        }
        if groups.is_empty() {
            return Err(io::Error::other("no control group is known to be its own"));
        }
        Ok(Freezers { groups })
    }

    pub fn stillness(&self) -> io::Result<Stillness> {
        let mut stillest = Stillness::Running;
        for group in &self.groups {
            stillest = stillest.max(group.stillness()?);
        }
        Ok(stillest)
    }

    /// Takes back every order to freeze.
    pub fn thaw(&self) -> io::Result<()> {
        for group in &self.groups {
            if group.stillness()?.is_ordered() {
                group.thaw()?;
            }
        }
        Ok(())
    }
}

impl Group {
    fn stillness(&self) -> io::Result<Stillness> {
        let found = match self.hierarchy {
            Hierarchy::Unified => {
                unified_stillness(&self.read("cgroup.freeze")?, &self.read("cgroup.events")?)
            }
            Hierarchy::Freezer => freezer_stillness(
                &self.read("freezer.self_freezing")?,
                &self.read("freezer.state")?,
            ),
        };
        // A group within is frozen together with the container's own.
        let is_shadow = found == Stillness::FrozenFromAbove && !self.is_outermost;
        Ok(if is_shadow { Stillness::Running } else { found })
    }

    fn read(&self, name: &str) -> io::Result<String> {
        let (file, _) = file::open_file_beneath(&self.directory, name.as_bytes())?;
        let mut text = String::new();
        File::from(file).take(4096).read_to_string(&mut text)?;
        Ok(text)
    }

    fn thaw(&self) -> io::Result<()> {
        let (name, order) = match self.hierarchy {
            Hierarchy::Unified => ("cgroup.freeze", "0"),
            Hierarchy::Freezer => ("freezer.state", "THAWED"),
        };
        let file = file::beneath(&self.directory, name.as_bytes(), OFlags::WRONLY)?;
        File::from(file).write_all(order.as_bytes())
    }
}

/// By `cgroup.freeze` and `cgroup.events`.
fn unified_stillness(freeze: &str, events: &str) -> Stillness {
    let is_frozen = events.lines().any(|line| line == "frozen 1");
    of_orders(freeze.trim() == "1", is_frozen)
}

/// By `freezer.self_freezing` and `freezer.state`.
fn freezer_stillness(ordered: &str, state: &str) -> Stillness {
    of_orders(ordered.trim() == "1", state.trim() == "FROZEN")
}

fn of_orders(is_ordered: bool, is_frozen: bool) -> Stillness {
    match (is_ordered, is_frozen) {
        (true, true) => Stillness::Frozen,
        (true, false) => Stillness::Freezing,
        (false, true) => Stillness::FrozenFromAbove,
        (false, false) => Stillness::Running,
    }
}

/// In which groups a process is, by its /proc/PID/cgroup, in the hierarchies that can
/// freeze. The root of a hierarchy is nobody's own and cannot be frozen.
fn paths(membership: &[u8]) -> impl Iterator<Item = (Hierarchy, &[u8])> {
    membership.split(|&byte| byte == b'\n').filter_map(|line| {
        let mut fields = line.splitn(3, |&byte| byte == b':');
        let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let has_freezer = || controllers.split(|&byte| byte == b',').any(|one| one == b"freezer");
        let hierarchy = match number {
            b"0" if controllers.is_empty() => Hierarchy::Unified,
            _ if has_freezer() => Hierarchy::Freezer,
            _ => return None,
        };
        (path.len() > 1 && path.starts_with(b"/")).then_some((hierarchy, path))
    })
}

/// Where a hierarchy is mounted as a whole.
fn mount_of(mountinfo: &[u8], hierarchy: Hierarchy) -> Option<Vec<u8>> {
    let controller = match hierarchy {
        Hierarchy::Unified => None,
        Hierarchy::Freezer => Some(&b"freezer"[..]),
    };
    super::procfs::hierarchy_mount(mountinfo, controller)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn d03_a_group_that_was_ordered_to_freeze_and_one_that_stands_still_are_two_things() {
        let unified = |freeze: &str, frozen: u8| {
            unified_stillness(&format!("{freeze}\n"), &format!("populated 1\nfrozen {frozen}\n"))
        };
        assert_eq!(unified("0", 0), Stillness::Running);
        assert_eq!(unified("1", 0), Stillness::Freezing, "a process waits in the kernel");
        assert_eq!(unified("1", 1), Stillness::Frozen);
        assert_eq!(unified("0", 1), Stillness::FrozenFromAbove);
        assert_eq!(freezer_stillness("0\n", "THAWED\n"), Stillness::Running);
        assert_eq!(freezer_stillness("1\n", "FREEZING\n"), Stillness::Freezing);
        assert_eq!(freezer_stillness("1\n", "FROZEN\n"), Stillness::Frozen);
        assert_eq!(freezer_stillness("0\n", "FROZEN\n"), Stillness::FrozenFromAbove);
        assert!(Stillness::Frozen.is_ordered() && Stillness::Freezing.is_ordered());
        assert!(!Stillness::Running.is_ordered() && !Stillness::FrozenFromAbove.is_ordered());
    }

    #[test]
    fn d03_only_the_hierarchies_that_freeze_are_looked_at_and_never_their_root() {
        let found = |text: &'static str| {
            let found = paths(text.as_bytes());
            found.map(|(one, path)| (one, std::str::from_utf8(path).unwrap())).collect::<Vec<_>>()
        };
        assert_eq!(
            found("9:name=systemd:/s\n6:cpu,freezer:/d/c:1\n3:cpuset:/x\n0::/u/c\n"),
            [(Hierarchy::Freezer, "/d/c:1"), (Hierarchy::Unified, "/u/c")]
        );
        assert_eq!(found("6:freezer:/\n0::/\n"), []);
        assert_eq!(found("6:freezer:relative\nnonsense\n0:\n"), []);
    }
}
