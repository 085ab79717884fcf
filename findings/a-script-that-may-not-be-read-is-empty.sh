#!/bin/sh
# Question: a security module refuses the reading of a script after it was opened (read(2)
#   fails with EPERM). What does the shell that runs the script report?
# Natural guess: an error and an exit status that is not 0, as bash does (126).
# What happens: dash and busybox's ash take the failed read for the end of the script. They run
#   nothing, print nothing, and end with 0. To whatever started it, a refused script is one
#   that succeeded. `.` does the same in them. Only bash says what happened.
# Needs: root, Linux 6.14 or newer with CONFIG_FANOTIFY_ACCESS_PERMISSIONS on ext4, XFS or
#   Btrfs, a C compiler, dash, bash, busybox.
set -eu
# Not in a tmpfs, where the kernel does not ask.
dir=$(mktemp -d -p "${TMPDIR:-/var/tmp}")
trap 'kill "$listener" 2>/dev/null || :; rm -rf "$dir"' EXIT
listener=
cat > "$dir/refuse.c" <<'EOC'
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/fanotify.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef FAN_PRE_ACCESS
#define FAN_PRE_ACCESS 0x00100000
#endif

/* Every read of the file fails. */
int main(int argc, char **argv) {
    (void)argc;
    int group = syscall(SYS_fanotify_init, FAN_CLASS_PRE_CONTENT, O_RDONLY);
    if (group < 0 || syscall(SYS_fanotify_mark, group, FAN_MARK_ADD, (uint64_t)FAN_PRE_ACCESS,
                             AT_FDCWD, argv[1]))
        return perror("fanotify"), 2;
    puts("ready");
    fflush(stdout);
    char buffer[4096];
    while (read(group, buffer, sizeof buffer) > 0) {
        struct fanotify_event_metadata *event = (void *)buffer;
        struct fanotify_response answer = {.fd = event->fd, .response = FAN_DENY};
        if (write(group, &answer, sizeof answer) < 0)
            return perror("write"), 2;
        close(event->fd);
    }
    return 0;
}
EOC
cc -o "$dir/refuse" "$dir/refuse.c"
echo 'echo it ran' > "$dir/script"
mkfifo "$dir/ready"
timeout 60 "$dir/refuse" "$dir/script" > "$dir/ready" &
listener=$!
read -r _ < "$dir/ready"
echo "Linux $(uname -r), $(busybox | head -n 1 | cut -d ' ' -f 1-2), bash $(bash -c 'echo $BASH_VERSION')"
for shell in dash "busybox sh" bash; do
    status=0
    printed=$($shell "$dir/script" 2>&1) || status=$?
    echo "$shell SCRIPT: status $status, $([ -z "$printed" ] && echo silent || echo a message)"
    status=0
    printed=$($shell -c ". $dir/script" 2>&1) || status=$?
    echo "$shell, '. SCRIPT': status $status, $([ -z "$printed" ] && echo silent || echo a message)"
done | tee "$dir/seen"
cat > "$dir/expected" <<'EOC'
dash SCRIPT: status 0, silent
dash, '. SCRIPT': status 0, silent
busybox sh SCRIPT: status 0, silent
busybox sh, '. SCRIPT': status 0, silent
bash SCRIPT: status 126, a message
bash, '. SCRIPT': status 1, a message
EOC
cmp "$dir/seen" "$dir/expected"
