//! Whether a program may be run as a hook: it is root's, and no other user can change or
//! replace it.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::config::Hook;

/// Others may add files to such a directory, and cannot replace those of root.
const STICKY: u32 = 0o1000;

/// The error says what is wrong with the program, and what to do.
pub fn check(program: &Path) -> Result<(), String> {
    let shown = program.display();
    let failed = |err: io::Error| format!("{shown} cannot be run: {err}");
    let real = program.canonicalize().map_err(failed)?;
    let metadata = real.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(format!("{shown} is no regular file"));
    }
    if !is_roots(&metadata) {
        return Err(format!(
            "{shown} belongs to another user than root, or others may write to it (chown root, \
             chmod go-w)"
        ));
    }
    if metadata.mode() & 0o111 == 0 {
        return Err(format!("{shown} is not executable (chmod +x)"));
    }
    // Also of the path as it is written, because it may lead over a link.
    for directory in real.ancestors().skip(1).chain(program.ancestors().skip(1)) {
        let metadata = directory.metadata().map_err(failed)?;
        let is_sticky = metadata.uid() == 0 && metadata.mode() & STICKY != 0;
        if !is_roots(&metadata) && !is_sticky {
            return Err(format!(
                "{shown} could be replaced: others than root may write to its directory {}",
                directory.display()
            ));
        }
    }
    Ok(())
}

fn is_roots(metadata: &Metadata) -> bool {
    metadata.uid() == 0 && metadata.mode() & 0o022 == 0
}

/// What is wrong with the programs and the users of the settings.
pub fn faults(hooks: &BTreeMap<String, Hook>) -> Vec<String> {
    let mut faults = Vec::new();
    for (name, hook) in hooks {
        if let Err(fault) = check(&hook.program) {
            faults.push(format!("hooks.{name}.program: {fault}"));
        }
        if let Some(user) = &hook.user
            && let Ok(None) = nix::unistd::User::from_name(user)
        {
            faults.push(format!("hooks.{name}.user: there is no user `{}`", user.escape_debug()));
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn only_a_program_of_root_that_no_other_user_can_replace_is_run() {
        assert_eq!(check(Path::new("/bin/sh")), Ok(()));
        let fault = |path: &Path| check(path).unwrap_err();
        assert!(fault(Path::new("/bin")).contains("no regular file"));
        assert!(fault(Path::new("/no/such/program")).contains("No such file"));
        assert!(fault(Path::new("/etc/passwd")).contains("not executable"));
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("hook");
        fs::write(&program, "#!/bin/sh\n").unwrap();
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        mode(&program, 0o775);
        assert!(fault(&program).contains("chmod go-w"), "the group may write");
        mode(&program, 0o755);
        assert_eq!(check(&program), Ok(()));
        let open = directory.path().join("open");
        fs::create_dir(&open).unwrap();
        mode(&open, 0o777);
        let link = open.join("link");
        symlink(&program, &link).unwrap();
        assert!(fault(&link).contains("could be replaced"), "the link may be another one soon");
        mode(&open, 0o1777);
        assert_eq!(check(&link), Ok(()));
        std::os::unix::fs::chown(&program, Some(1), None).unwrap();
        assert!(fault(&program).contains("chown root"));
    }
}
