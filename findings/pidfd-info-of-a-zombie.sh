#!/bin/sh
# Question: a process has ended and its parent has not waited for it yet; its pidfd is
#   readable. What does ioctl(PIDFD_GET_INFO) with PIDFD_INFO_EXIT return as its exit code?
# Natural guess: the exit code, since poll(2) on the pidfd reports that it has ended; or an
#   error, since there is nothing to report yet.
# What happens: the call succeeds, PIDFD_INFO_EXIT is not in the returned mask, and the
#   field exit_code is 0, as after success. Once the parent has waited, the same call on
#   the same pidfd returns the bit and the real status. So the mask must be checked.
# Needs: Linux 6.15 or newer (PIDFD_INFO_EXIT), a C compiler. No root.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cat > "$dir/zombie.c" <<'EOF'
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* As linux/pidfd.h has it since 6.15; older headers lack it. */
struct info {
    uint64_t mask, cgroupid;
    uint32_t pid, tgid, ppid, ruid, rgid, euid, egid, suid, sgid, fsuid, fsgid;
    int32_t exit_code;
};
#define GET_INFO _IOWR(0xFF, 11, struct info)
#define INFO_EXIT (1ULL << 3)

static void ask(const char *when, int pidfd) {
    struct info info;
    memset(&info, 0, sizeof info);
    info.exit_code = -1;
    info.mask = INFO_EXIT;
    if (ioctl(pidfd, GET_INFO, &info) < 0)
        printf("%s: error %s\n", when, strerror(errno));
    else
        printf("%s: exit bit %s, exit_code %d\n", when,
               info.mask & INFO_EXIT ? "set" : "not set", info.exit_code);
}

int main(void) {
    pid_t pid = fork();
    if (pid == 0)
        _exit(3);
    int pidfd = syscall(SYS_pidfd_open, pid, 0);
    if (pidfd < 0)
        return perror("pidfd_open"), 2;
    struct pollfd wait_for = {.fd = pidfd, .events = POLLIN};
    poll(&wait_for, 1, -1);
    printf("poll: %s\n", wait_for.revents & POLLIN ? "has ended" : "?");
    ask("zombie", pidfd);
    int status;
    waitpid(pid, &status, 0);
    ask("reaped", pidfd);
    return 0;
}
EOF
cc -o "$dir/zombie" "$dir/zombie.c"
echo "Linux $(uname -r)"
"$dir/zombie" | tee "$dir/seen"
cat > "$dir/expected" <<'EOF'
poll: has ended
zombie: exit bit not set, exit_code 0
reaped: exit bit set, exit_code 768
EOF
cmp "$dir/seen" "$dir/expected"
