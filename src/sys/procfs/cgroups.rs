//! Control groups of a process, and where their hierarchies are mounted.
//!
//! `freezer` uses them to find a container's groups, `containerd` to see whether a process is in
//! one, and `watch` to match the records of perf.

use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;

use super::handle::Handle;

impl Handle {
    /// Its control groups, a line for each hierarchy.
    pub fn groups(&self) -> io::Result<Vec<u8>> {
        self.read("cgroup", 64 * 1024)
    }

    /// The path of its control group in the unified hierarchy, as the host sees it.
    pub fn cgroup(&self) -> io::Result<Vec<u8>> {
        let groups = self.groups()?;
        groups
            .split(|&byte| byte == b'\n')
            .find_map(|line| line.strip_prefix(b"0::"))
            .map(<[u8]>::to_vec)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// The inode of its control group's directory in perf's hierarchy: the unified one,
    /// unless perf has one of its own. `None` if the process is in the root of the
    /// hierarchy, or the hierarchy is not mounted here.
    pub fn perf_cgroup(&self) -> Option<u64> {
        // Both texts are the host's: no container chooses them.
        let groups = self.groups().ok()?;
        let (is_unified, path) = perf_cgroup_path(&groups)?;
        let mountinfo = Handle::open(std::process::id()).ok()?.mountinfo().ok()?;
        let controller = (!is_unified).then_some(&b"perf_event"[..]);
        let mut directory = hierarchy_mount(&mountinfo, controller)?;
        directory.extend(&path);
        std::fs::metadata(std::ffi::OsStr::from_bytes(&directory)).ok().map(|found| found.ino())
    }
}

/// A process's group in perf's hierarchy, and whether that is the unified one. `None` for
/// the hierarchy's root, which identifies no container.
fn perf_cgroup_path(groups: &[u8]) -> Option<(bool, Vec<u8>)> {
    let mut found = None;
    for line in groups.split(|&byte| byte == b'\n') {
        let mut fields = line.splitn(3, |&byte| byte == b':');
        let (Some(number), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        if controllers.split(|&byte| byte == b',').any(|name| name == b"perf_event") {
            found = Some((false, path.to_vec()));
            break;
        }
        if number == b"0" && controllers.is_empty() {
            found = Some((true, path.to_vec()));
        }
    }
    found.filter(|(_, path)| path.len() > 1)
}

/// Where the whole hierarchy of a controller of cgroup v1 is mounted, or, without a
/// controller, the unified one.
pub(in crate::sys) fn hierarchy_mount(
    mountinfo: &[u8],
    controller: Option<&[u8]>,
) -> Option<Vec<u8>> {
    mountinfo.split(|&byte| byte == b'\n').find_map(|line| {
        let words: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
        let separator = words.iter().position(|word| *word == b"-")?;
        let (root, mount_point) = (words.get(3)?, words.get(4)?);
        let kind = *words.get(separator + 1)?;
        let options = words.get(separator + 3)?;
        let is_it = match controller {
            None => kind == b"cgroup2",
            Some(controller) => {
                kind == b"cgroup"
                    && options.split(|&byte| byte == b',').any(|option| option == controller)
            }
        };
        (is_it && *root == b"/").then(|| mount_point.to_vec())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn perfs_control_group_is_the_unified_one_unless_it_has_its_own() {
        let unified = b"3:cpuset:/\n0::/system.slice/x:y.scope\n";
        assert_eq!(perf_cgroup_path(unified), Some((true, b"/system.slice/x:y.scope".to_vec())));
        let own = b"0::/unified\n4:cpu,perf_event:/pods/a\n";
        assert_eq!(perf_cgroup_path(own), Some((false, b"/pods/a".to_vec())));
        assert_eq!(perf_cgroup_path(b"0::/\n"), None);
        let mountinfo = b"41 31 0:38 / /sys/fs/cgroup rw shared:1 - cgroup2 cgroup2 rw\n\
            42 31 0:39 / /sys/fs/cgroup/perf rw - cgroup cgroup rw,cpu,perf_event\n";
        assert_eq!(hierarchy_mount(mountinfo, None), Some(b"/sys/fs/cgroup".to_vec()));
        assert_eq!(
            hierarchy_mount(mountinfo, Some(b"perf_event")),
            Some(b"/sys/fs/cgroup/perf".to_vec())
        );
        assert_eq!(hierarchy_mount(b"", None), None);
    }
}
