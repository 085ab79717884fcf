# PostgreSQL that compiles its queries, nginx and Redis under load.
# Attack: critical exec.new /var/lib/postgresql/backup

as_postgres() {
    setpriv --reuid=postgres --regid=postgres --init-groups env HOME=/var/lib/postgresql "$@"
}

prepare() {
    bin=$(echo /usr/lib/postgresql/*/bin)
    data=/var/lib/postgresql/data
    as_postgres "$bin/initdb" -D $data
    printf 'jit = on\njit_above_cost = 0\njit_inline_above_cost = 0\njit_optimize_above_cost = 0\n' \
        >>$data/postgresql.conf
    mkdir -p /run/postgresql
    chown postgres /run/postgresql
    as_postgres "$bin/pg_ctl" -D $data -l /var/lib/postgresql/log -w start
    as_postgres "$bin/pgbench" -i -s 2 postgres
    sed -i 's/listen \[::\]/# &/' /etc/nginx/sites-available/default
    nginx
    redis-server --daemonize yes --dir /var/lib/redis --save 5 1
}

round() {
    as_postgres "$bin/pgbench" -c 4 -T 5 postgres
    as_postgres "$bin/psql" -c 'select sum(abalance * 2) from pgbench_accounts where aid % 3 = 1' postgres
    as_postgres "$bin/pg_dump" -Fc -f /var/lib/postgresql/dump postgres
    ab -q -n 2000 -c 8 http://127.0.0.1/
    redis-benchmark -q -n 5000 -t set,get,lpush
    redis-cli bgrewriteaof
    nginx -s reload
}

attack() {
    cp /.control/payload /var/lib/postgresql/backup
    as_postgres /var/lib/postgresql/backup
}
