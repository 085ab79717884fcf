#!/bin/sh
# Question: an overlay is mounted with `-o volatile`, as container engines do for
#   containers that are removed afterwards. How does /proc/self/mountinfo show it?
# Natural guess: as it was given, `volatile`, so that a program that reads the options can
#   search for this word between commas.
# What happens: Linux 6.18 shows `fsync=volatile` and no option `volatile`. A program that
#   searches for the bare word takes the overlay for one that keeps its data after a crash.
# Needs: root; seen on Linux 6.18.
set -eu
if [ "${1-}" != inside ]; then
    exec unshare --mount --propagation private "$0" inside
fi
dir=$(mktemp -d)
trap 'umount "$dir/all/overlay" "$dir/all" 2>/dev/null || :; rm -rf "$dir"' EXIT
mkdir "$dir/all"
mount -t tmpfs tmpfs "$dir/all"
cd "$dir/all"
mkdir lower upper work overlay
mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work,volatile overlay overlay
echo "Linux $(uname -r)"
options=$(grep " - overlay overlay " /proc/self/mountinfo | grep "lowerdir=lower," | sed 's/.* //')
cd /
echo "$options"
case ",$options," in
*,volatile,*) echo "shown as: volatile"; exit 1 ;;
*,fsync=volatile,*) echo "shown as: fsync=volatile" ;;
*) echo "not shown"; exit 1 ;;
esac
