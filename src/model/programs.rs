//! The programs that driftd knows by name, with their roles: one table.
//!
//! A name proves nothing, because a container chooses it. Each caller decides what follows
//! from a name, and what else has to hold. This file reads no files and judges nothing.

use Role::{
    Accounts, Archiver, Entrance, Guard, Installer, InstallerIf, InstallerScript,
    InstallerScriptIf, Launcher, Linker, MultiCall, Runs, RunsInstallers, Runtime, Shell, Tool,
};

/// The language of an interpreter's scripts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Language {
    Shell,
    Python,
    Perl,
    Ruby,
    Node,
    Php,
    Lua,
    Tcl,
    Awk,
}

/// What a program is known for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// A shell: what it runs was written by others.
    Shell,
    /// It interprets scripts in this language.
    Runs(Language),
    /// Its first argument that is a file is code, whatever the file looks like.
    Launcher,
    /// One file with many programs: its first argument, or the name of a link to it, selects
    /// one of them.
    MultiCall,
    /// It moves data, opens shells or changes privileges. A name under which multi-call
    /// programs offer such a tool.
    Tool,
    /// A shell, or a program that watches or protects: without it a system is blind or
    /// crippled.
    Guard,
    /// A package manager.
    Installer,
    /// A package manager with one of these verbs. With others it does other things, such as
    /// running an application.
    InstallerIf(&'static [&'static str]),
    /// It can run a package manager that is a script.
    RunsInstallers,
    /// A package manager that is a script or a module of an interpreter.
    InstallerScript,
    /// Such a script, with one of these verbs.
    InstallerScriptIf(&'static [&'static str]),
    /// It makes programs out of objects.
    Linker,
    /// It writes whole trees of files: it unpacks an archive, or checks out a revision.
    Archiver,
    /// It starts containers.
    Runtime,
    /// It enters the namespaces or the root of a container.
    Entrance,
    /// It changes users and groups.
    Accounts,
}

/// No verb is needed.
const ALWAYS: &[&str] = &[];
const CONDA: &[&str] = &["create", "install", "remove", "update", "upgrade"];

/// In the order of the names, for a binary search.
#[rustfmt::skip]
const PROGRAMS: &[(&str, &[Role])] = &[
    ("7z", &[Archiver]),
    ("7za", &[Archiver]),
    ("7zr", &[Archiver]),
    ("addgroup", &[Accounts]),
    ("adduser", &[Accounts]),
    ("aide", &[Guard]),
    ("ansible", &[InstallerScript]),
    ("ansible-playbook", &[InstallerScript]),
    ("ansible-pull", &[InstallerScript]),
    ("apk", &[Installer]),
    ("apt", &[Installer]),
    ("apt-get", &[Installer]),
    ("aptitude", &[Installer]),
    ("ash", &[Shell, Runs(Language::Shell), Launcher, Tool, Guard]),
    ("auditctl", &[Guard]),
    ("auditd", &[Guard]),
    ("ausearch", &[Guard]),
    ("awk", &[Runs(Language::Awk)]),
    ("bash", &[Shell, Runs(Language::Shell), Launcher, Tool, Guard]),
    ("bsdcpio", &[Archiver]),
    ("bsdtar", &[Archiver]),
    ("bun", &[Launcher]),
    ("busybox", &[Shell, MultiCall]),
    ("busybox.static", &[MultiCall]),
    ("cargo", &[InstallerIf(&["install", "uninstall"])]),
    ("chef-client", &[InstallerScript]),
    ("chef-solo", &[InstallerScript]),
    ("chpasswd", &[Accounts]),
    ("chroot", &[Entrance]),
    ("cinc-client", &[InstallerScript]),
    ("clamdscan", &[Guard]),
    ("clamscan", &[Guard]),
    ("collect2", &[Linker]),
    ("composer", &[InstallerScriptIf(&["install", "remove", "require", "update"])]),
    ("conda", &[InstallerIf(CONDA), InstallerScriptIf(CONDA)]),
    ("cpio", &[Archiver]),
    ("crun", &[Runtime]),
    ("curl", &[Tool]),
    ("dash", &[Shell, Runs(Language::Shell), Launcher, Tool, Guard]),
    ("deluser", &[Accounts]),
    ("deno", &[Launcher]),
    ("dnf", &[Installer, InstallerScript]),
    ("dnf5", &[Installer]),
    ("docker-runc", &[Runtime]),
    ("dpkg", &[Installer]),
    ("dpkg-deb", &[Installer]),
    ("dumpcap", &[Guard]),
    ("emerge", &[Installer]),
    ("ensurepip", &[InstallerScript]),
    ("expect", &[Runs(Language::Tcl)]),
    ("fail2ban-server", &[Guard]),
    ("falco", &[Guard]),
    ("ftpget", &[Tool]),
    ("ftpput", &[Tool]),
    ("gawk", &[Runs(Language::Awk)]),
    ("gem", &[InstallerScriptIf(&["install", "uninstall", "update"])]),
    ("git", &[Archiver]),
    ("go", &[InstallerIf(&["install"])]),
    ("gold", &[Linker]),
    ("groupadd", &[Accounts]),
    ("groupdel", &[Accounts]),
    ("groupmod", &[Accounts]),
    ("gtar", &[Archiver]),
    ("hg", &[Archiver]),
    ("hush", &[Runs(Language::Shell)]),
    ("ip6tables", &[Guard]),
    ("iptables", &[Guard]),
    ("java", &[Launcher]),
    ("jruby", &[Runs(Language::Ruby)]),
    ("ksh", &[Shell, Runs(Language::Shell), Launcher]),
    ("ld", &[Linker]),
    ("ld.bfd", &[Linker]),
    ("ld.gold", &[Linker]),
    ("ld.lld", &[Linker]),
    ("ld.mold", &[Linker]),
    ("lld", &[Linker]),
    ("lsof", &[Guard]),
    ("lua", &[Runs(Language::Lua), Launcher]),
    ("luajit", &[Runs(Language::Lua)]),
    ("mamba", &[InstallerIf(CONDA)]),
    ("mawk", &[Runs(Language::Awk)]),
    ("microdnf", &[Installer]),
    ("micromamba", &[InstallerIf(CONDA)]),
    ("mksh", &[Shell, Runs(Language::Shell)]),
    ("mold", &[Linker]),
    ("nawk", &[Runs(Language::Awk)]),
    ("nc", &[Tool]),
    ("ncat", &[Tool]),
    ("netcat", &[Tool]),
    ("newusers", &[Accounts]),
    ("nft", &[Guard]),
    ("nix-env", &[InstallerIf(&["install", "upgrade", "uninstall"])]),
    ("node", &[Runs(Language::Node), Launcher, RunsInstallers]),
    ("nodejs", &[Runs(Language::Node), RunsInstallers]),
    ("npm", &[InstallerScriptIf(&["add", "ci", "i", "in", "install", "remove", "uninstall", "update"])]),
    ("nsenter", &[Entrance]),
    ("opkg", &[Installer]),
    ("original-awk", &[Runs(Language::Awk)]),
    ("osqueryd", &[Guard]),
    ("pacman", &[Installer]),
    ("passwd", &[Accounts]),
    ("pax", &[Archiver]),
    ("pdm", &[InstallerScriptIf(&["add", "install", "remove", "sync", "update"])]),
    ("perl", &[Runs(Language::Perl), Launcher, RunsInstallers, Tool]),
    ("php", &[Runs(Language::Php), Launcher, RunsInstallers]),
    ("pip", &[InstallerScriptIf(&["install", "uninstall"])]),
    ("pipenv", &[InstallerScriptIf(&["install", "sync", "uninstall", "update"])]),
    ("pipx", &[InstallerScriptIf(&["inject", "install", "reinstall", "uninstall", "upgrade"])]),
    ("platform-python", &[RunsInstallers]),
    ("pnpm", &[InstallerScriptIf(&["add", "i", "install", "remove", "update"])]),
    ("poetry", &[InstallerScriptIf(&["add", "install", "remove", "sync", "update"])]),
    ("posh", &[Runs(Language::Shell)]),
    ("ps", &[Guard]),
    ("puppet", &[InstallerScriptIf(&["agent", "apply"])]),
    ("pypy", &[Runs(Language::Python)]),
    ("python", &[Runs(Language::Python), Launcher, RunsInstallers, Tool]),
    ("python3", &[Tool]),
    ("rbash", &[Runs(Language::Shell)]),
    ("rkhunter", &[Guard]),
    ("rpm", &[Installer]),
    ("ruby", &[Runs(Language::Ruby), Launcher, RunsInstallers]),
    ("runc", &[Runtime]),
    ("rust-lld", &[Linker]),
    ("salt-call", &[InstallerScript]),
    ("sh", &[Shell, Runs(Language::Shell), Launcher, Tool, Guard]),
    ("socat", &[Tool]),
    ("ss", &[Guard]),
    ("ssh", &[Tool]),
    ("strace", &[Guard]),
    ("su", &[Tool]),
    ("sudo", &[Tool]),
    ("svn", &[Archiver]),
    ("tar", &[Archiver]),
    ("tcc", &[Linker]),
    ("tclsh", &[Runs(Language::Tcl)]),
    ("tcpdump", &[Guard]),
    ("tdnf", &[Installer]),
    ("telnet", &[Tool]),
    ("texlua", &[Runs(Language::Lua)]),
    ("tftp", &[Tool]),
    ("toybox", &[Shell, MultiCall]),
    ("tripwire", &[Guard]),
    ("unsquashfs", &[Archiver]),
    ("unzip", &[Archiver]),
    ("useradd", &[Accounts]),
    ("userdel", &[Accounts]),
    ("usermod", &[Accounts]),
    ("uv", &[InstallerIf(&["add", "pip", "remove", "sync", "tool", "venv"])]),
    ("venv", &[InstallerScript]),
    ("virtualenv", &[InstallerScript]),
    ("wget", &[Tool]),
    ("wish", &[Runs(Language::Tcl)]),
    ("xbps-install", &[Installer]),
    ("yarn", &[InstallerScriptIf(&["add", "global", "install", "remove", "upgrade"])]),
    ("yash", &[Runs(Language::Shell)]),
    ("youki", &[Runtime]),
    ("yum", &[Installer, InstallerScript]),
    ("zsh", &[Shell, Runs(Language::Shell), Launcher, Tool, Guard]),
    ("zypper", &[Installer]),
];

/// How the file names of dynamic linkers begin; whether the system's own is named so, which
/// is a guard: without it no program starts.
const DYNAMIC_LINKERS: [(&[u8], bool); 5] = [
    (b"ld-linux", true),
    (b"ld-musl", true),
    (b"ld.so", false),
    (b"ld64.so", false),
    (b"ld-2.", false),
];

fn roles(name: &[u8]) -> &'static [Role] {
    match PROGRAMS.binary_search_by_key(&name, |(known, _)| known.as_bytes()) {
        Ok(at) => PROGRAMS[at].1,
        Err(_) => &[],
    }
}

fn has(name: &[u8], role: Role) -> bool {
    roles(name).contains(&role)
}

/// `python3.11` is a `python`.
pub fn without_version(name: &[u8]) -> &[u8] {
    without_end(name, |byte| byte.is_ascii_digit() || byte == b'.')
}

fn without_end(name: &[u8], is_of_end: impl Fn(u8) -> bool) -> &[u8] {
    let length = name.iter().rposition(|byte| !is_of_end(*byte)).map_or(0, |last| last + 1);
    &name[..length]
}

/// Whether a program of this name is a shell: what it runs was written by others.
pub fn is_shell(name: &[u8]) -> bool {
    has(name, Shell)
}

/// The language that a program of this name interprets: `lua5.4` is a `lua`, and `python3-`
/// a `python`.
pub fn language(name: &[u8]) -> Option<Language> {
    let name = without_end(name, |byte| byte.is_ascii_digit() || matches!(byte, b'.' | b'-'));
    roles(name).iter().find_map(|role| match role {
        Runs(language) => Some(*language),
        _ => None,
    })
}

/// Whether the first argument that is a file is code to a program of this name, whatever
/// the file looks like.
pub fn is_launcher(name: &[u8]) -> bool {
    has(without_version(name), Launcher)
}

/// Whether a file of this name holds many programs.
pub fn is_multicall(name: &[u8]) -> bool {
    has(name, MultiCall)
}

/// Whether a multi-call program that is called by this name takes its first argument for
/// the name of the program to run: it does so for any name that begins with its own.
pub fn is_multicalls_own_name(called: &[u8]) -> bool {
    called.starts_with(b"busybox") || called.starts_with(b"toybox")
}

/// Whether a program of this name moves data, opens shells or changes privileges.
pub fn is_tool(name: &[u8]) -> bool {
    has(name, Tool)
}

/// Whether a system without the program of this name is blind or crippled: shells, the
/// dynamic linker, and programs that watch or protect.
pub fn is_guard(name: &[u8]) -> bool {
    has(name, Guard)
        || DYNAMIC_LINKERS.iter().any(|(start, is_guard)| *is_guard && name.starts_with(start))
}

/// Whether a file of this name is a dynamic linker, which runs the program that it is given.
pub fn is_dynamic_linker(name: &[u8]) -> bool {
    DYNAMIC_LINKERS.iter().any(|(start, _)| name.starts_with(start))
}

/// Whether a program of this name changes users and groups.
pub fn changes_accounts(name: &[u8]) -> bool {
    has(name, Accounts)
}

/// The name under which a process runs its program: that of the applet, for a multi-call
/// program.
pub fn called_as<'a>(exe: &'a str, argv: Option<&'a [String]>) -> &'a str {
    let name = |path: &'a str| path.rsplit('/').next().unwrap_or_default();
    let is_multicall = |name: &str| is_multicall(name.as_bytes());
    let given = argv.into_iter().flatten().map(|argument| name(argument));
    match name(exe) {
        own if is_multicall(own) => given.take(2).find(|one| !is_multicall(one)).unwrap_or(own),
        own => own,
    }
}

/// Whether a program of this name unpacks archives, or checks out revisions.
pub fn is_archiver(name: &[u8]) -> bool {
    has(name, Archiver)
}

/// Whether a program of this name starts containers. Any program can have the name.
pub fn is_runtime(name: &[u8]) -> bool {
    has(name, Runtime)
}

/// The names of the programs that start containers.
pub fn runtimes() -> impl Iterator<Item = &'static str> {
    PROGRAMS.iter().filter(|(_, roles)| roles.contains(&Runtime)).map(|(name, _)| *name)
}

/// Whether a process with this command name may be a container runtime on its way into a
/// container: a hint for what to keep of it. Any process can take the name.
pub fn may_be_runtime(comm: &[u8]) -> bool {
    // crun and youki keep their own name until they become the container's program.
    comm.starts_with(b"runc:[") || comm == b"crun" || comm.starts_with(b"youki")
}

/// Whether a process with this command name may be on its way into a container: a runtime, or a
/// tool that enters namespaces. Any process can take the name.
pub fn comes_in(comm: &[u8]) -> bool {
    may_be_runtime(comm) || is_entrance(comm)
}

/// Whether a program of this name enters the namespaces of a container.
pub fn is_entrance(name: &[u8]) -> bool {
    has(name, Entrance)
}

/// Whether a process with this command name may be one of containerd's shims, which start
/// runtimes.
pub fn may_be_shim(comm: &[u8]) -> bool {
    comm.starts_with(b"containerd-shim")
}

/// Whether the program at this path makes programs out of objects.
pub fn is_linker(exe: &str) -> bool {
    let name = exe.rsplit('/').next().unwrap_or_default();
    // x86_64-linux-gnu-ld.bfd
    let name = name.rsplit_once("-gnu-").map_or(name, |(_, name)| name);
    // Go's linker, and `go` itself, which copies the linked program to its place.
    has(name.as_bytes(), Linker)
        || name == "link" && exe.contains("/pkg/tool/")
        || name == "go" && exe.ends_with("/bin/go")
}

/// Whether a program of this name can be a package manager, with the right arguments.
pub fn may_install(name: &[u8]) -> bool {
    let is_installer = |role: &Role| matches!(role, Installer | InstallerIf(_));
    roles(name).iter().any(is_installer) || runs_installers(name)
}

/// The verbs with which a program of this name is a package manager: `Some(&[])` if it
/// always is one, `None` if it never is.
pub fn installs_with(name: &[u8]) -> Option<&'static [&'static str]> {
    roles(name).iter().find_map(|role| match role {
        Installer => Some(ALWAYS),
        InstallerIf(verbs) => Some(*verbs),
        _ => None,
    })
}

/// Whether a program of this name can run a package manager that is a script.
pub fn runs_installers(name: &[u8]) -> bool {
    has(without_version(name), RunsInstallers)
}

/// The same as [`installs_with`] for a script or a module of an interpreter.
pub fn script_installs_with(name: &[u8]) -> Option<&'static [&'static str]> {
    roles(name).iter().find_map(|role| match role {
        InstallerScript => Some(ALWAYS),
        InstallerScriptIf(verbs) => Some(*verbs),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_in_order_and_names_no_program_twice() {
        let names: Vec<&str> = PROGRAMS.iter().map(|(name, _)| *name).collect();
        assert!(names.is_sorted_by(|one, next| one < next), "{names:?}");
    }

    #[test]
    fn a_version_belongs_to_no_name() {
        assert_eq!(language(b"python3.11"), Some(Language::Python));
        assert_eq!(language(b"lua5.4"), Some(Language::Lua));
        assert_eq!(language(b"cat"), None);
        assert!(is_launcher(b"python3.11") && !is_launcher(b"python-x") && !is_launcher(b"awk"));
        assert!(runs_installers(b"python3.9") && !runs_installers(b"pypy3"));
    }

    #[test]
    fn one_program_has_a_role_for_one_question_and_not_for_another() {
        assert!(is_shell(b"busybox") && language(b"busybox").is_none());
        assert!(!is_shell(b"rbash") && language(b"rbash") == Some(Language::Shell));
        assert!(is_guard(b"ld-musl-x86_64.so.1") && !is_guard(b"ld.so"));
        assert!(is_dynamic_linker(b"ld.so") && !is_dynamic_linker(b"ld"));
        assert!(is_tool(b"python3") && !is_tool(b"python3.11"));
    }

    #[test]
    fn linkers_are_known_with_their_target_and_go_by_its_place() {
        for exe in ["/usr/bin/x86_64-linux-gnu-ld.bfd", "/opt/go/bin/go", "/go/pkg/tool/x/link"] {
            assert!(is_linker(exe), "{exe}");
        }
        assert!(!is_linker("/usr/bin/link") && !is_linker("/usr/local/go"));
    }
}
