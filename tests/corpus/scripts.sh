# Schedulers and supervisors that run scripts under names which they make up (Airflow,
# Jenkins), or copy the image's own to /run (s6); cron.
# Attack: high exec.tmpfs /run/service/evil

prepare() {
    cron
}

round() {
    for number in $(seq 20); do
        script=$(mktemp)
        printf 'echo %s\nsleep 0.1\n' "$number" >"$script"
        sh "$script"
        rm "$script"
    done
    for number in $(seq 10); do
        directory=$(mktemp -d /tmp/airflowtmpXXXXXXXX)
        script=$(mktemp "$directory/tmpXXXXXXXX")
        printf 'echo task %s\nsleep 0.1\n' "$number" >"$script"
        bash "$script"
        rm -r "$directory"
        script=$(mktemp /tmp/jenkinsXXXXXXXXXXXX.sh)
        printf '#!/bin/sh -xe\necho build %s\nsleep 0.1\n' "$number" >"$script"
        sh -xe "$script"
        rm "$script"
    done
    for service in ldd zgrep gzexe zdiff zcmp znew; do
        mkdir -p /run/service/$service
        cp /usr/bin/$service /run/service/$service/run
        /run/service/$service/run --version || true
    done
}

attack() {
    cp /.control/payload /run/service/evil
    /run/service/evil
}
