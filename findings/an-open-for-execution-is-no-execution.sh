#!/bin/sh
# Question: does fanotify's FAN_OPEN_EXEC_PERM (or FAN_OPEN_EXEC) mean that a process is
#   about to become that program?
# Natural guess: yes, unless the listener denies it; for a script one event for the script
#   and one for its interpreter.
# What happens: the event comes with the open, before the kernel has read the file. It also
#   comes for a check without execution (AT_EXECVE_CHECK, Linux 6.14) and for an execve that
#   fails afterwards: a file that is open for writing (ETXTBSY), an ELF file for no machine
#   (ENOEXEC), a script whose interpreter is missing (ENOENT). The process continues with its
#   old program. A program that counts executions needs a second source, such as
#   sched_process_exec.
# Needs: root, Linux 6.14 or newer with CONFIG_FANOTIFY_ACCESS_PERMISSIONS, a C compiler.
set -eu
if [ "${1-}" != inside ]; then
    exec unshare --mount --propagation private "$0" inside
fi
dir=$(mktemp -d)
trap 'umount "$dir/files" 2>/dev/null || :; rm -rf "$dir"' EXIT
cat > "$dir/ask.c" <<'EOF'
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fanotify.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef AT_EXECVE_CHECK
#define AT_EXECVE_CHECK 0x10000
#endif

/* A child executes FILE, or only checks it. Prints the result and the number of events. */
static void try(int group, const char *what, const char *file, int flags) {
    int pipes[2], error = 0, events = 0, status;
    if (pipe2(pipes, O_CLOEXEC))
        return perror("pipe2");
    pid_t child = fork();
    if (child == 0) {
        char *arguments[] = {"a", NULL}, *environment[] = {NULL};
        if (syscall(SYS_execveat, AT_FDCWD, file, arguments, environment, flags))
            error = errno;
        if (write(pipes[1], &error, sizeof error) < 0)
            perror("write");
        _exit(0);
    }
    close(pipes[1]);
    struct pollfd waits[] = {{.fd = group, .events = POLLIN}, {.fd = pipes[0], .events = POLLIN}};
    int has_answered = 0;
    while (!has_answered) {
        poll(waits, 2, -1);
        if (waits[0].revents & POLLIN) {
            char buffer[4096];
            ssize_t length = read(group, buffer, sizeof buffer);
            struct fanotify_event_metadata *event = (void *)buffer;
            for (; FAN_EVENT_OK(event, length); event = FAN_EVENT_NEXT(event, length)) {
                struct fanotify_response answer = {.fd = event->fd, .response = FAN_ALLOW};
                events += event->pid == child;
                if (write(group, &answer, sizeof answer) < 0)
                    perror("write");
                close(event->fd);
            }
        } else if (waits[1].revents) {
            /* A successful execve closes the pipe; then nothing was written. */
            if (read(pipes[0], &error, sizeof error) != sizeof error)
                error = -1;
            has_answered = 1;
        }
    }
    waitpid(child, &status, 0);
    printf("%s: %d event, %s\n", what, events,
           error < 0 ? "executed" : error ? strerror(error) : "not executed, no error");
    fflush(stdout);
}

int main(int argc, char **argv) {
    (void)argc;
    int group = syscall(SYS_fanotify_init, FAN_CLASS_CONTENT | FAN_CLOEXEC, O_RDONLY);
    if (group < 0 || syscall(SYS_fanotify_mark, group, FAN_MARK_ADD | FAN_MARK_FILESYSTEM,
                             (uint64_t)FAN_OPEN_EXEC_PERM, AT_FDCWD, argv[1]))
        return perror("fanotify"), 2;
    if (chdir(argv[1]))
        return perror(argv[1]), 2;
    try(group, "program", "program", 0);
    try(group, "program, checked", "program", AT_EXECVE_CHECK);
    try(group, "program for no machine", "foreign", 0);
    try(group, "script without its interpreter", "script", 0);
    int writer = open("program", O_WRONLY | O_CLOEXEC);
    try(group, "program that is open for writing", "program", 0);
    close(writer);
    return 0;
}
EOF
cc -o "$dir/ask" "$dir/ask.c"
mkdir "$dir/files"
mount -t tmpfs none "$dir/files"
echo 'int main(void) { return 0; }' > "$dir/program.c"
cc -static -o "$dir/files/program" "$dir/program.c"
cp "$dir/files/program" "$dir/files/foreign"
# e_machine: none.
printf '\0\0' | dd of="$dir/files/foreign" bs=1 seek=18 conv=notrunc 2>/dev/null
printf '#!/missing\n' > "$dir/files/script"
chmod +x "$dir/files/script"
echo "Linux $(uname -r)"
timeout 20 "$dir/ask" "$dir/files" | tee "$dir/seen"
cat > "$dir/expected" <<'EOF'
program: 1 event, executed
program, checked: 1 event, not executed, no error
program for no machine: 1 event, Exec format error
script without its interpreter: 1 event, No such file or directory
program that is open for writing: 1 event, Text file busy
EOF
cmp "$dir/seen" "$dir/expected"
