#!/bin/sh
# Question: overlayfs refuses a fanotify mark for FAN_PRE_ACCESS. Is a file that is read
#   through an overlay thereby out of reach of a listener for that event?
# Natural guess: yes; the read happens on the overlay, which takes no such mark.
# What happens: the mark on the overlay fails with EOPNOTSUPP, but a listener that marks
#   the filesystem of the layers (ext4 here) is asked for each read through the overlay
#   too. The event's descriptor is the layer's file, its pid is the reader's, and a
#   denial makes the read through the overlay fail with EPERM. So a listener on the disk
#   of a container runtime can block every container on it.
# Needs: root, Linux 6.14 or newer with CONFIG_FANOTIFY_ACCESS_PERMISSIONS, a C compiler,
#   mke2fs, a loop device.
set -eu
if [ "${1-}" != inside ]; then
    exec unshare --mount --propagation private "$0" inside
fi
dir=$(mktemp -d)
trap 'umount "$dir/overlay" "$dir/disk" 2>/dev/null || :; rm -rf "$dir"' EXIT
cat > "$dir/listen.c" <<'EOF'
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fanotify.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef FAN_PRE_ACCESS
#define FAN_PRE_ACCESS 0x00100000
#endif

static int mark(int group, const char *path) {
    return syscall(SYS_fanotify_mark, group, FAN_MARK_ADD | FAN_MARK_FILESYSTEM,
                   (uint64_t)FAN_PRE_ACCESS, AT_FDCWD, path);
}

/* listen OVERLAY DISK FILE: a child reads FILE, and each event of it is denied. */
int main(int argc, char **argv) {
    (void)argc;
    int group = syscall(SYS_fanotify_init, FAN_CLASS_PRE_CONTENT, O_RDONLY);
    if (group < 0)
        return perror("fanotify_init"), 2;
    printf("mark on the overlay: %s\n", mark(group, argv[1]) ? strerror(errno) : "accepted");
    printf("mark on the layers' filesystem: %s\n",
           mark(group, argv[2]) ? strerror(errno) : "accepted");
    fflush(stdout);
    pid_t reader = fork();
    if (reader == 0) {
        char byte;
        int file = open(argv[3], O_RDONLY);
        ssize_t count = file < 0 ? -1 : read(file, &byte, 1);
        printf("read through the overlay: %s\n", count < 0 ? strerror(errno) : "succeeded");
        fflush(stdout);
        /* An event of a listener that ends is allowed. */
        _exit(0);
    }
    char buffer[4096];
    ssize_t length = read(group, buffer, sizeof buffer);
    struct fanotify_event_metadata *event = (void *)buffer;
    if (length < (ssize_t)sizeof *event)
        return perror("read"), 2;
    printf("event's process: %s\n", event->pid == reader ? "the reader" : "another one");
    fflush(stdout);
    struct fanotify_response answer = {.fd = event->fd, .response = FAN_DENY};
    if (write(group, &answer, sizeof answer) < 0)
        return perror("write"), 2;
    waitpid(reader, NULL, 0);
    return 0;
}
EOF
cc -o "$dir/listen" "$dir/listen.c"
truncate -s 32M "$dir/image"
mke2fs -q -t ext4 "$dir/image"
mkdir "$dir/disk" "$dir/overlay"
mount -o loop "$dir/image" "$dir/disk"
mkdir "$dir/disk/lower" "$dir/disk/upper" "$dir/disk/work"
echo text > "$dir/disk/lower/file"
mount -t overlay -o "lowerdir=$dir/disk/lower,upperdir=$dir/disk/upper,workdir=$dir/disk/work" \
    overlay "$dir/overlay"
echo "Linux $(uname -r)"
# The event comes even if the file's pages are in the cache.
timeout 20 "$dir/listen" "$dir/overlay" "$dir/disk" "$dir/overlay/file" | tee "$dir/seen"
cat > "$dir/expected" <<'EOF'
mark on the overlay: Operation not supported
mark on the layers' filesystem: accepted
event's process: the reader
read through the overlay: Operation not permitted
EOF
cmp "$dir/seen" "$dir/expected"
