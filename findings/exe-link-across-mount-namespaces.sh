#!/bin/sh
# Question: a process of the host runs a program of another mount namespace, by the name
#   /proc/PID/root/bin/sleep. What do /proc/self/exe and /proc/self/maps show?
# Natural guess: that name, or a name marked as not reachable from here, as getcwd(2) marks it
#   with `(unreachable)`.
# What happens: the path of the file in the other namespace, `/bin/sleep`, without any sign.
#   The host has another file by this name. So the name in /proc/PID/exe finds a file only
#   together with its device and inode. getcwd(2) in the directory of the same file returns
#   `(unreachable)/bin`, and readlink of /proc/self/cwd returns `/bin`.
# Needs: root, a static busybox, a C compiler.
set -eu
dir=$(mktemp -d)
inside=
trap '[ -z "$inside" ] || kill "$inside"; rm -rf "$dir"' EXIT
mkdir "$dir/root"
cat > "$dir/cwd.c" <<'C'
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv) {
    char path[4096], link[4096] = "";
    if (argc < 2 || chdir(argv[1]))
        return 1;
    /* The system call itself: the C library turns this result into an error. */
    syscall(SYS_getcwd, path, sizeof path);
    readlink("/proc/self/cwd", link, sizeof link - 1);
    printf("%s %s\n", path, link);
    return 0;
}
C
cc -o "$dir/cwd" "$dir/cwd.c"

# A namespace whose root is a tmpfs with one program. Its process reports when it is ready.
mkfifo "$dir/ready"
unshare --mount --propagation private sh -ec '
    mount -t tmpfs none "$1/root"
    mkdir "$1/root/bin" "$1/root/old"
    cp "$(command -v busybox)" "$1/root/bin/sleep"
    exec 3> "$1/ready"
    cd "$1/root"
    pivot_root . old
    echo >&3
    exec 3>&-
    exec /bin/sleep 60' sh "$dir" &
inside=$!
read -r _ < "$dir/ready"
until [ "$(readlink "/proc/$inside/exe")" = /bin/sleep ]; do sleep 0.1; done

"/proc/$inside/root/bin/sleep" 5 &
outside=$!
until [ "$(readlink "/proc/$outside/exe")" != "$(readlink "/proc/$$/exe")" ]; do sleep 0.1; done
exe=$(readlink "/proc/$outside/exe")
map=$(awk '/sleep/ { print $6; exit }' "/proc/$outside/maps")
file=$(stat -L -c %d:%i "/proc/$outside/exe")
hosts=$(stat -L -c %d:%i /bin/sleep)
cwd=$("$dir/cwd" "/proc/$inside/root/bin")
kill "$outside"

echo "kernel $(uname -r)"
echo "exe: $exe, maps: $map, its file: $file"
echo "the host's $exe: $hosts"
echo "getcwd and /proc/self/cwd: $cwd"
[ "$exe" = /bin/sleep ] && [ "$map" = /bin/sleep ] && [ "$file" != "$hosts" ] &&
    [ "$cwd" = "(unreachable)/bin /bin" ]
