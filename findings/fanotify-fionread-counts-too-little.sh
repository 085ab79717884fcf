#!/bin/sh
# Question: ioctl(FIONREAD) on a fanotify group says how many bytes wait. Does a buffer of
#   that size hold what one read returns?
# Natural guess: yes, as with inotify, a pipe or a socket.
# What happens: in a group that reports names (FAN_REPORT_DFID_NAME), FIONREAD counts 24
#   bytes for each event, the size of its fixed part, and leaves out the handles and names
#   behind it. A read into a buffer of 24 bytes for one waiting event fails with EINVAL, and
#   a program that sizes its buffer by FIONREAD never reads that event. The number of events
#   is right: FIONREAD divided by 24.
# Needs: root, a C compiler; seen on Linux 6.18.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cat > "$dir/count.c" <<'EOC'
#include <errno.h>
#include <fcntl.h>
#include <linux/fanotify.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef FAN_REPORT_DFID_NAME
#define FAN_REPORT_DFID_NAME 0x00000c00
#endif

/* count DIRECTORY: one file is made in it, and its event read in two ways. */
int main(int argc, char **argv) {
    char small[24], large[4096], path[4096];
    int waiting = -1, group, file;
    ssize_t length;
    (void)argc;
    group = syscall(SYS_fanotify_init, FAN_CLASS_NOTIF | FAN_NONBLOCK | FAN_REPORT_DFID_NAME, 0);
    if (group < 0)
        return perror("fanotify_init"), 2;
    if (syscall(SYS_fanotify_mark, group, FAN_MARK_ADD, (uint64_t)FAN_CREATE, AT_FDCWD, argv[1]))
        return perror("fanotify_mark"), 2;
    snprintf(path, sizeof path, "%s/a-file-with-a-name", argv[1]);
    file = open(path, O_CREAT | O_WRONLY, 0600);
    if (file < 0 || ioctl(group, FIONREAD, &waiting))
        return perror("open or ioctl"), 2;
    printf("FIONREAD: %d bytes\n", waiting);
    if (waiting != 24)
        return 1;
    length = read(group, small, (size_t)waiting);
    printf("read into that many bytes: %s\n", length < 0 ? strerror(errno) : "works");
    if (length >= 0 || errno != EINVAL)
        return 1;
    length = read(group, large, sizeof large);
    printf("read into 4096 bytes: %zd bytes\n", length);
    return length > waiting ? 0 : 1;
}
EOC
cc -Wall -o "$dir/count" "$dir/count.c"
echo "Linux $(uname -r)"
mkdir "$dir/watched"
"$dir/count" "$dir/watched"
