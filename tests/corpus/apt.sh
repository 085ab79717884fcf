# Installs Debian packages with their maintainer scripts, and uses them from then on.
# Attack: critical exec.new /usr/bin/jq

round() {
    DEBIAN_FRONTEND=noninteractive apt-get install -y --no-download --no-install-recommends \
        jq python3-numpy memcached
    for number in 1 2 3; do
        echo "{\"number\": $number}" | jq .number
        python3 -c 'import numpy; print(numpy.arange(6).reshape(2, 3).sum())'
    done
    memcached -u memcache -l 127.0.0.1 -d
    sleep 1
    pkill -x memcached
}

attack() {
    cp /.control/payload /usr/bin/jq.new
    mv /usr/bin/jq.new /usr/bin/jq
    /usr/bin/jq
}
