//! Other ways by which a container reaches its files: a directory where persistence is
//! watched for, or one above it, that has become a link, or that something was mounted
//! over. What lies behind it is then as good as in the place itself.

use std::collections::HashSet;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;

use super::lower;
use super::state;
use crate::model::{Fact, RootfsPath, Source};
use crate::sys::file;
use crate::sys::mounts::{self, Mount};
use crate::sys::overlay;
use crate::sys::procfs::Handle;
use crate::watch::code::inspect;
use crate::watch::core::shared::Shared;
use crate::watch::core::table::Watched;

/// More of one container are not followed. Each link is reported itself.
const MAX_WAYS: usize = 64;

/// The ways of one container.
#[derive(Debug, Default)]
pub(in crate::watch) struct Ways(Mutex<All>);

#[derive(Debug, Default)]
struct All {
    ways: Vec<Way>,
    /// Ways that the image has by itself: its links, and homes of its users. `None`:
    /// nobody has looked.
    of_image: Option<Vec<(RootfsPath, RootfsPath)>>,
    /// Moves with each walk of everything.
    walk: u64,
    /// Sensitive places where something was mounted when the container was first looked
    /// at: by its runtime.
    mounted: Option<HashSet<Vec<u8>>>,
}

#[derive(Debug)]
struct Way {
    from: RootfsPath,
    to: RootfsPath,
    /// The link as it is called in the upper layer; `None` for a mount.
    link: Option<RootfsPath>,
    /// The walk that saw it last.
    walk: u64,
}

impl Ways {
    fn all(&self) -> MutexGuard<'_, All> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The path by which a file is reached as well.
    pub(in crate::watch) fn leading_to(&self, path: &RootfsPath) -> Option<RootfsPath> {
        let all = self.all();
        all.ways.iter().find_map(|way| {
            let rest = overlay::strip_directory(path.as_bytes(), way.to.as_bytes())?;
            let from = way.from.as_bytes();
            RootfsPath::new([from, b"/".as_slice(), rest].concat()).ok()
        })
    }

    /// A path that stands for `path` in the image, if such a one is wanted.
    pub(in crate::watch) fn known_as(
        &self,
        path: &RootfsPath,
        is_wanted: impl Fn(&RootfsPath) -> bool,
    ) -> Option<RootfsPath> {
        let all = self.all();
        all.of_image.iter().flatten().find_map(|(from, to)| {
            let rest = overlay::strip_directory(path.as_bytes(), to.as_bytes())?;
            let known_as = [from.as_bytes(), b"/".as_slice(), rest].concat();
            RootfsPath::new(known_as).ok().filter(|known_as| is_wanted(known_as))
        })
    }

    /// True if it is news.
    fn add(&self, from: &RootfsPath, to: RootfsPath, link: Option<&RootfsPath>) -> bool {
        let mut all = self.all();
        let walk = all.walk;
        if let Some(way) = all.ways.iter_mut().find(|way| way.from == *from && way.to == to) {
            way.walk = walk;
            return false;
        }
        // One that leads back to above itself would make the whole container sensitive.
        if from.is_within(&to) || to.is_within(from) || all.ways.len() >= MAX_WAYS {
            return false;
        }
        all.ways.push(Way { from: from.clone(), to, link: link.cloned(), walk });
        true
    }

    /// There is no link of this name any more.
    pub(in crate::watch) fn forget(&self, link: &RootfsPath) {
        self.all().ways.retain(|way| way.link.as_ref() != Some(link));
    }

    /// A walk of everything begins, which sees all links that are there.
    pub(in crate::watch) fn begin_walk(&self) {
        self.all().walk += 1;
    }

    pub(in crate::watch) fn end_walk(&self) {
        let mut all = self.all();
        let walk = all.walk;
        all.ways.retain(|way| way.link.is_none() || way.walk == walk);
    }
}

/// Looks once at what the image itself has: links on the way to places where persistence
/// is watched for, and homes that are elsewhere than usual. A home counts as `/home/USER`.
pub(in crate::watch) fn learn_image(shared: &Shared, watched: &Watched) {
    let Some(layers) = watched.layers() else { return };
    if watched.ways.all().of_image.is_some() {
        return;
    }
    let links = shared.settings.persistence.literal().into_iter().filter_map(|place| {
        let from = RootfsPath::new(&place).ok()?;
        let mut to = from.clone();
        // No image has a longer chain that leads anywhere.
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
    watched.ways.all().of_image = Some(ways);
}

/// More of an image's `/etc/passwd` is not read.
const MAX_USERS_BYTES: u64 = 64 << 10;

/// The homes of users that are not where homes usually are.
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

/// A link that leads away from a sensitive place.
pub(in crate::watch) fn note_link(
    shared: &Shared,
    watched: &Watched,
    link: &RootfsPath,
    target: &[u8],
) {
    let from = watched.ways.leading_to(link).unwrap_or_else(|| link.clone());
    // By its text, also where nothing is there yet, and where the kernel says that it ends.
    let by_text = link.resolve(target);
    let at_last = || {
        let init = Handle::open_exactly(watched.init).ok()?;
        let found = inspect::open_in(watched, &init, link.as_bytes())?;
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
        // What lies there already has been taken for data.
        watched.ask_for_walk();
        shared.wake_scan();
    }
}

/// What a container, and not its runtime, has mounted over a sensitive place.
pub(in crate::watch) fn note_mounts(
    shared: &Shared,
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
    let before = watched.ways.all().mounted.replace(there());
    for (at, mount) in sensitive {
        // A runtime mounts nothing of the container's own root.
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
        // Behind a filesystem that would have to be asked there may be anything.
        let state = stat.map_or_else(|_| state::of_mount(), |stat| state::unopened(&stat));
        let fact = Fact::Present { path: at, state, lower: None, writer: None };
        shared.observe(watched, Timestamp::now(), Source::Change, fact);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> RootfsPath {
        RootfsPath::new(text).unwrap()
    }

    #[test]
    fn x15_what_lies_behind_a_link_is_reached_by_it() {
        let ways = Ways::default();
        let reached = |text: &str| ways.leading_to(&path(text)).map(|path| path.to_string());
        let link = path("/etc/cron.d");
        assert!(ways.add(&link, path("/tmp/cr"), Some(&link)));
        assert!(!ways.add(&link, path("/tmp/cr"), Some(&link)), "known");
        assert_eq!(reached("/tmp/cr/a").as_deref(), Some("/etc/cron.d/a"));
        assert_eq!(reached("/tmp/cr").as_deref(), Some("/etc/cron.d"));
        assert_eq!(reached("/tmp/crx/a"), None);
        // One that leads to above itself makes nothing else sensitive.
        for above in ["/", "/etc"] {
            assert!(!ways.add(&path("/etc/cron.daily"), path(above), None));
        }
        // A walk that has not seen it, and somebody who has removed it.
        ways.begin_walk();
        ways.end_walk();
        assert_eq!(reached("/tmp/cr/a"), None);
        ways.add(&link, path("/tmp/cr"), Some(&link));
        ways.forget(&link);
        assert_eq!(reached("/tmp/cr/a"), None);
        // A mount is in no upper layer.
        ways.add(&link, path("/tmp/cr"), None);
        ways.begin_walk();
        ways.end_walk();
        assert!(reached("/tmp/cr/a").is_some());
    }

    #[test]
    fn r22_homes_are_where_the_images_users_have_them() {
        let users = b"root:x:0:0::/root:/bin/sh\nbob:x:1:1::/home/b:/bin/sh\n\
            postgres:x:70:70::/var/lib/postgresql:/bin/sh\nnone:x:2:2::/:\nbad\n";
        let homes = homes(users);
        assert_eq!(homes, [(path("/home/postgres"), path("/var/lib/postgresql"))]);
        let ways = Ways::default();
        ways.all().of_image = Some(homes);
        let known_as = |text: &str| {
            let found = ways.known_as(&path(text), |path| path.file_name() == b".profile");
            found.map(|path| path.to_string())
        };
        let profile = known_as("/var/lib/postgresql/.profile");
        assert_eq!(profile.as_deref(), Some("/home/postgres/.profile"));
        assert_eq!(known_as("/var/lib/postgresql/data"), None);
        assert_eq!(known_as("/var/lib/.profile"), None);
    }

    #[test]
    fn no_number_of_links_takes_more_than_its_room() {
        let ways = Ways::default();
        for number in 0..1000 {
            ways.add(&path(&format!("/home/{number}")), path(&format!("/tmp/{number}")), None);
        }
        assert_eq!(ways.all().ways.len(), MAX_WAYS);
    }
}
