//! Other paths by which a container reaches sensitive files: a directory that is watched for
//! persistence, or one above it, became a link or was mounted over. Files behind the link
//! or mount then count as files of the sensitive directory.
//!
//! `walk`, `settle` and `mounts` call it. The known ways are in `core::ways`. It reports new
//! mounts over sensitive places, and requests a scan when a new way is found.

use std::os::fd::AsFd as _;
use std::sync::Arc;

use jiff::Timestamp;

use super::lower;
use super::state;
use crate::model::{Fact, FileFact, RootfsPath, Source};
use crate::sys::mounts::{self, Mount};
use crate::sys::procfs::Handle;
use crate::sys::{file, overlay};
use crate::watch::core::watched::Watched;
use crate::watch::core::ways::MAX_WAYS;
use crate::watch::process::reach;
use crate::watch::process::shared::Processes;

/// Reads the image once: links on the paths of places that are watched for persistence, and
/// home directories in unusual places, which count as `/home/USER`.
pub(crate) fn learn_image(shared: &Processes, watched: &Watched) {
    let Some(layers) = watched.layers() else { return };
    if watched.ways.knows_image() {
        return;
    }
    let links = shared.settings.persistence.literal().into_iter().filter_map(|place| {
        let from = RootfsPath::new(&place).ok()?;
        let mut to = from.clone();
        // Bounded, since links can form a circle. Real images have shorter chains.
        for _ in 0..8 {
            let Some(target) = lower::link_target(layers, &to) else { break };
            to = to.resolve(&target)?;
        }
        (to != from && !from.is_within(&to) && !to.is_within(&from)).then_some((from, to))
    });
    let users = RootfsPath::new("/etc/passwd").ok();
    let users = users.and_then(|path| lower::read(layers, &path, MAX_USERS_BYTES));
    let mut ways: Vec<_> = links.take(MAX_WAYS).collect();
    ways.extend(homes(&users.unwrap_or_default()).into_iter().take(MAX_WAYS));
    watched.ways.set_of_image(ways);
}

/// The most that is read of an image's `/etc/passwd`.
const MAX_USERS_BYTES: u64 = 64 << 10;

/// The home directories that are in unusual places, each after its usual path.
fn homes(users: &[u8]) -> Vec<(RootfsPath, RootfsPath)> {
    let of = |line: &[u8]| {
        let mut fields = line.split(|&byte| byte == b':');
        let (name, home) = (fields.next()?, fields.nth(4)?);
        let home = RootfsPath::new(home).ok().filter(|home| home.parent().is_some())?;
        let usual = RootfsPath::new([b"/home/", name].concat()).ok()?;
        let is_usual = home.parent().is_some_and(|parent| parent.as_bytes() == b"/home");
        (!is_usual && home.as_bytes() != b"/root").then_some((usual, home))
    };
    users.split(|&byte| byte == b'\n').filter_map(of).collect()
}

/// Notes a link that leads away from a sensitive place.
pub(crate) fn note_link(shared: &Processes, watched: &Watched, link: &RootfsPath, target: &[u8]) {
    let from = watched.ways.leading_to(link).unwrap_or_else(|| link.clone());
    // Both by its text, even if nothing exists there yet, and by where the kernel finds its end.
    let by_text = link.resolve(target);
    let at_last = || {
        let init = Handle::open_exactly(watched.init).ok()?;
        let found = reach::open_in(watched, &init, link.as_bytes())?;
        let owner = shared.table.owner(&file::stat(&found).ok()?)?;
        if owner.container != watched.container {
            return None;
        }
        let name = file::name_of(found.as_fd()).ok()?;
        let below_root = overlay::strip_directory(&name, &watched.root_name);
        RootfsPath::new(below_root.unwrap_or(&name)).ok()
    };
    let mut is_news = false;
    for to in [by_text, at_last()].into_iter().flatten() {
        is_news |= watched.ways.add(&from, to, Some(link));
    }
    if is_news {
        // Files that are there already were taken for data.
        watched.ask_for_walk();
        shared.wake_scan();
    }
}

/// Notes and reports what a container, and not its runtime, has mounted over a sensitive place.
pub(crate) fn note_mounts(
    shared: &Processes,
    watched: &Arc<Watched>,
    init: &Handle,
    mounts: impl Iterator<Item = Mount>,
) {
    let sensitive: Vec<(RootfsPath, Mount)> = mounts
        .filter_map(|mount| Some((RootfsPath::new(&mount.mount_point).ok()?, mount)))
        .filter(|(at, _)| {
            shared.is_sensitive(watched, at) || shared.leads_to_sensitive(watched, at)
        })
        .collect();
    let there = || sensitive.iter().map(|(_, mount)| mount.mount_point.clone()).collect();
    let before = watched.ways.replace_mounted(there());
    for (at, mount) in sensitive {
        // Runtimes do not mount parts of the container's own root.
        let is_own = mount.device == watched.device && mount.root != b"/";
        let is_new = before.as_ref().is_some_and(|before| !before.contains(&mount.mount_point));
        let to = RootfsPath::new(&mount.root).ok().filter(|_| is_own);
        if to.is_some_and(|to| watched.ways.add(&at, to, None)) {
            watched.ask_for_walk();
            shared.wake_scan();
        } else if !is_new {
            continue;
        }
        let root = init.open_root();
        let stat = root
            .and_then(|root| mounts::reach(&root, &mount.mount_point))
            .and_then(|reached| file::stat(&reached));
        // If its filesystem could block, it must not be accessed, and its content is unknown.
        let state = stat.map_or_else(|_| state::of_mount(), |stat| state::unopened(&stat));
        let fact = Fact::File(FileFact::Present {
            path: at,
            state,
            lower: None,
            writer: None,
            changed: None,
        });
        shared.observe(watched, Timestamp::now(), Source::Change, fact);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::watch::core::ways::Ways;

    fn path(text: &str) -> RootfsPath {
        RootfsPath::new(text).unwrap()
    }

    #[test]
    fn r22_homes_are_where_the_image_defines_them() {
        let users = b"root:x:0:0::/root:/bin/sh\nbob:x:1:1::/home/b:/bin/sh\n\
            postgres:x:70:70::/var/lib/postgresql:/bin/sh\nnone:x:2:2::/:\nbad\n";
        let homes = homes(users);
        assert_eq!(homes, [(path("/home/postgres"), path("/var/lib/postgresql"))]);
        let ways = Ways::default();
        ways.set_of_image(homes);
        let known_as = |text: &str| {
            let found = ways.known_as(&path(text), |path| path.file_name() == b".profile");
            found.map(|path| path.to_string())
        };
        let profile = known_as("/var/lib/postgresql/.profile");
        assert_eq!(profile.as_deref(), Some("/home/postgres/.profile"));
        assert_eq!(known_as("/var/lib/postgresql/data"), None);
        assert_eq!(known_as("/var/lib/.profile"), None);
    }
}
