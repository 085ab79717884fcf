# A CI runner writes each step of its jobs into a script of its own and runs it.
# Attack: critical exec.new /home/runner/_work/_temp/999.sh

round() {
    mkdir -p /home/runner/_work/_temp /home/runner/_work/project
    cd /home/runner/_work/project
    for number in $(seq 60); do
        step=/home/runner/_work/_temp/$number.sh
        printf 'echo step %s >step.txt\ngrep -q step step.txt\nsleep 0.1\n' "$number" >$step
        sh -e $step
        rm $step
    done
    for number in $(seq 20); do
        step=/home/runner/_work/_temp/$(cat /proc/sys/kernel/random/uuid).sh
        printf 'set -o pipefail\necho "%s" | grep -c .\nsleep 0.1\n' "$number" >$step
        bash --noprofile --norc -e $step
        rm $step
    done
}

attack() {
    cp /.control/payload /home/runner/_work/_temp/999.sh
    /home/runner/_work/_temp/999.sh
}
