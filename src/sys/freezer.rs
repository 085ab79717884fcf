//! Control groups that freeze their processes: the unified hierarchy's `cgroup.freeze`, and
//! the freezer of cgroup v1.
//!
//! A container may have chosen a part of a path in `/proc/PID/cgroup`. The path is opened
//! below the hierarchy's mount, through no link and on no other mount. The descriptor stays
//! that group's, even if another group gets its name.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;

use rustix::fs::OFlags;

use super::file;
use super::procfs::Handle;

/// How many groups of one container are read, from its own down to that of its init.
const MOST_LEVELS: usize = 32;
/// How many entries of a container's own group are read.
const MOST_ENTRIES: usize = 1024;

/// Whether the processes of a container run, in the order of stillness.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stillness {
    Running,
    /// A group above the container's is frozen, and the container's with it.
    FrozenFromAbove,
    /// A freeze was requested. A process that waits in the kernel stops when it returns from
    /// there.
    Freezing,
    Frozen,
}

impl Stillness {
    /// Whether a freeze of the container's own group was requested.
    pub fn is_ordered(self) -> bool {
        matches!(self, Stillness::Freezing | Stillness::Frozen)
    }
}

/// The hierarchies of control groups that can freeze.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hierarchy {
    Unified,
    /// The freezer of cgroup v1.
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
    /// The container's own group, which contains all its others.
    is_outermost: bool,
}

impl Freezers {
    /// The groups of the container with this init. `own` returns the length of the path of
    /// the container's own group in the path of init's group. An error if there is no such
    /// group: then no group may be changed.
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

    /// The stillness of the whole container. A container can freeze one group within its
    /// own, which has no effect on the others.
    pub fn stillness(&self) -> io::Result<Stillness> {
        let mut stillest = Stillness::Running;
        for group in self.groups.iter().filter(|group| group.is_outermost) {
            stillest = stillest.max(group.stillness_with_children()?);
        }
        Ok(stillest)
    }

    /// Whether a freeze of one of init's groups was requested.
    pub fn is_ordered(&self) -> io::Result<bool> {
        for group in &self.groups {
            if group.stillness()?.is_ordered() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Withdraws every request to freeze.
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
        Ok(match self.hierarchy {
            Hierarchy::Unified => {
                unified_stillness(&self.read("cgroup.freeze")?, &self.read("cgroup.events")?)
            }
            Hierarchy::Freezer => freezer_stillness(
                &self.read("freezer.self_freezing")?,
                &self.read("freezer.state")?,
            ),
        })
    }

    /// crun puts the processes into a group within the group that systemd has made, and
    /// freezes the inner one. Nothing runs if every inner group with processes is frozen.
    fn stillness_with_children(&self) -> io::Result<Stillness> {
        let found = self.stillness()?;
        if found != Stillness::Running || self.hierarchy != Hierarchy::Unified {
            return Ok(found);
        }
        let has_processes = self.read("cgroup.procs").is_ok_and(|pids| !pids.is_empty());
        if has_processes {
            return Ok(found);
        }
        let mut least = None;
        for (number, entry) in rustix::fs::Dir::read_from(&self.directory)?.enumerate() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if number == MOST_ENTRIES {
                return Ok(found);
            }
            if [&b"."[..], b".."].contains(&name)
                || entry.file_type() != rustix::fs::FileType::Directory
            {
                continue;
            }
            let directory = file::open_directory_beneath(&self.directory, name)?;
            let child = Group { directory, hierarchy: self.hierarchy, is_outermost: false };
            if child.read("cgroup.events")?.lines().any(|line| line == "populated 1") {
                let child = child.stillness()?;
                least = Some(least.map_or(child, |least: Stillness| least.min(child)));
            }
        }
        Ok(least.unwrap_or(found))
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

/// The groups of a process in the hierarchies that can freeze, from its `/proc/PID/cgroup`.
/// The root of a hierarchy belongs to no container and cannot be frozen.
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

/// Where the whole of a hierarchy is mounted.
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

    /// In the unified hierarchy, which needs root.
    #[test]
    fn d03_a_container_stands_still_when_all_of_its_groups_do() {
        struct Tree(std::path::PathBuf, Vec<std::process::Child>);
        impl Tree {
            fn write(&self, path: &str, text: &str) {
                std::fs::write(self.0.join(path), text).unwrap();
            }
            fn start(&mut self, group: &str) {
                std::fs::create_dir(self.0.join(group)).unwrap();
                let child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
                self.write(&format!("{group}/cgroup.procs"), &child.id().to_string());
                self.1.push(child);
            }
        }
        impl Drop for Tree {
            fn drop(&mut self) {
                for group in ["one", "two"] {
                    let _ = std::fs::write(self.0.join(group).join("cgroup.freeze"), "0");
                }
                for child in &mut self.1 {
                    let _ = child.kill();
                    let _ = child.wait();
                }
                for group in ["one", "two", ""] {
                    let _ = std::fs::remove_dir(self.0.join(group));
                }
            }
        }
        let mountinfo = Handle::open(std::process::id()).unwrap().mountinfo().unwrap();
        let mount = mount_of(&mountinfo, Hierarchy::Unified).expect("no cgroup2 is mounted");
        let name = format!("driftd-test-freezer-{}", std::process::id());
        let root = std::path::Path::new(std::str::from_utf8(&mount).unwrap()).join(&name);
        std::fs::create_dir(&root).expect("making a control group needs root");
        let mut tree = Tree(root, Vec::new());
        tree.start("one");
        let init = Handle::open(tree.1[0].id()).unwrap();
        let own =
            |path: &[u8]| path.starts_with(format!("/{name}/").as_bytes()).then(|| 1 + name.len());
        let freezers = Freezers::of(&init, own).unwrap();
        let until = |wanted| {
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
            while freezers.stillness().unwrap() != wanted {
                assert!(std::time::Instant::now() < deadline, "{:?}", freezers.stillness());
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        };
        assert_eq!(freezers.stillness().unwrap(), Stillness::Running);
        tree.write("one/cgroup.freeze", "1");
        until(Stillness::Frozen);
        assert!(freezers.is_ordered().unwrap());
        // Init stands still, and another process of the container runs.
        tree.start("two");
        assert_eq!(freezers.stillness().unwrap(), Stillness::Running);
        assert!(freezers.is_ordered().unwrap());
        freezers.thaw().unwrap();
        assert!(!freezers.is_ordered().unwrap());
        tree.write("cgroup.freeze", "1");
        until(Stillness::Frozen);
        freezers.thaw().unwrap();
        until(Stillness::Running);
        assert!(Freezers::of(&init, |_| None).is_err(), "no group is known to be its own");
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
