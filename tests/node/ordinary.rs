//! Ordinary work of healthy containers. None of it is drift. Each test ends with a canary,
//! which is drift, so that silence is not mistaken for blindness.

use libtest_mimic::Trial;

use crate::node::Node;
use crate::test;

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("b01_logs_are_appended_and_rotated", b01_logs),
        test("b03_python_caches_bytecode", b03_bytecode),
        test("b05_entrypoint_writes_configuration", b05_configuration),
        test("b06_locks_and_databases_of_packages", b06_locks),
        test("b07_sockets_pipes_and_pid_files", b07_sockets),
        test("b08_chmod_of_an_image_script", b08_chmod),
        test("b09_chown_of_image_programs", b09_chown),
        test("b10_touch_of_an_image_program", b10_touch),
        test("b11_opened_for_writing_and_not_written", b11_opened),
        test("b12_configuration_is_replaced_by_rename", b12_rename),
        test("b13_editors_replace_files", b13_editors),
        test("b14_program_is_replaced_by_its_own_bytes", b14_same_bytes),
        test("b16_caches_of_libraries_and_certificates", b16_caches),
        test("b18_data_with_odd_modes", b18_modes),
        test("b19_host_keys_are_made", b19_host_keys),
        test("b20_files_that_look_like_programs_and_cannot_run", b20_objects),
        test("b21_symlinks_over_logs_and_alternatives", b21_symlinks),
    ]
}

/// Runs `commands` and expects that driftd reports nothing.
fn silent(node: &Node, commands: &str) -> anyhow::Result<()> {
    let container = node.container()?;
    container.sh(commands)?;
    container.expect_silence()
}

fn b01_logs(node: &Node) -> anyhow::Result<()> {
    silent(
        node,
        "echo one >> /var/log/app.log; echo two >> /var/log/app.log\n\
         mv /var/log/app.log /var/log/app.log.1; gzip /var/log/app.log.1\n\
         echo three >> /var/log/app.log",
    )
}

fn b03_bytecode(node: &Node) -> anyhow::Result<()> {
    silent(
        node,
        "mkdir -p /usr/lib/python3/__pycache__\n\
         printf '\\247\\015\\015\\012\\000\\000\\000\\000' > /usr/lib/python3/__pycache__/m.cpython-311.pyc",
    )
}

fn b05_configuration(node: &Node) -> anyhow::Result<()> {
    silent(
        node,
        "sed 's/${PORT}/8080/' < /etc/nginx/default.conf.template > /etc/nginx/conf.d/default.conf\n\
         ( exec /usr/sbin/nginx )",
    )
}

fn b06_locks(node: &Node) -> anyhow::Result<()> {
    silent(
        node,
        "mkdir -p /var/lib/dpkg; exec 9>/var/lib/dpkg/lock-frontend; exec 9>&-\n\
         echo 'Package: x' >> /var/lib/dpkg/status; mv /var/lib/dpkg/status /var/lib/dpkg/status-old",
    )
}

fn b13_editors(node: &Node) -> anyhow::Result<()> {
    silent(
        node,
        "sed -i s/80/81/ /etc/app.conf\n\
         cd /etc; echo > 4913; rm 4913; echo b0VIM > .app.conf.swp\n\
         mv app.conf app.conf~; echo 'listen = 82' > app.conf; chmod 644 app.conf\n\
         rm app.conf~ .app.conf.swp",
    )
}

fn b16_caches(node: &Node) -> anyhow::Result<()> {
    silent(
        node,
        "echo glibc-ld.so.cache1.1 > /etc/ld.so.cache~; chmod 644 /etc/ld.so.cache~\n\
         mv /etc/ld.so.cache~ /etc/ld.so.cache; mkdir -p /etc/ssl/certs; cd /etc/ssl/certs\n\
         echo CERTIFICATE > bundle.new; mv -f bundle.new ca-certificates.crt\n\
         echo CERTIFICATE > one.pem; ln -sf one.pem 0a1b2c3d.0",
    )
}

fn b18_modes(node: &Node) -> anyhow::Result<()> {
    silent(
        node,
        "mkdir -p /var/lib/postgres; echo 15 > /var/lib/postgres/PG_VERSION\n\
         chmod 700 /var/lib/postgres/PG_VERSION /var/lib/postgres\n\
         echo text > /srv.txt; chmod 755 /srv.txt; echo a,b > /tmp/x.csv; chmod 777 /tmp/x.csv",
    )
}

fn b19_host_keys(node: &Node) -> anyhow::Result<()> {
    silent(
        node,
        "mkdir -p /etc/ssh; cd /etc/ssh; echo KEY > ssh_host_rsa_key; chmod 600 ssh_host_rsa_key\n\
         echo 'ssh-rsa AAAA' > ssh_host_rsa_key.pub",
    )
}

fn b20_objects(node: &Node) -> anyhow::Result<()> {
    // ELF headers of a core dump and of an object file, a class and an archive.
    silent(
        node,
        "head='\\177ELF\\002\\001\\001\\000\\000\\000\\000\\000\\000\\000\\000\\000'\n\
         printf \"$head\\004\\000\\076\\000\" > /tmp/core.123; chmod 600 /tmp/core.123\n\
         printf \"$head\\001\\000\\076\\000\" > /tmp/x.o; chmod 755 /tmp/x.o\n\
         printf '\\312\\376\\272\\276' > /tmp/X.class; printf 'PK\\003\\004' > /tmp/x.jar\n\
         printf '\\000asm' > /tmp/x.wasm",
    )
}

fn b07_sockets(node: &Node) -> anyhow::Result<()> {
    silent(
        node,
        "/usr/bin/app 1 /tmp/app.sock; mkfifo /tmp/queue; echo $$ > /run/app.pid\n\
         [ -S /tmp/app.sock ]; [ -p /tmp/queue ]",
    )
}

fn b08_chmod(node: &Node) -> anyhow::Result<()> {
    silent(node, "chmod +x /docker-entrypoint.d/10-x.sh; /docker-entrypoint.d/10-x.sh")
}

fn b09_chown(node: &Node) -> anyhow::Result<()> {
    silent(node, "chown -R app:app /app; /app/server")
}

fn b10_touch(node: &Node) -> anyhow::Result<()> {
    silent(node, "/usr/bin/touch /usr/bin/app; /usr/bin/app")
}

fn b11_opened(node: &Node) -> anyhow::Result<()> {
    silent(node, "exec 3<>/usr/bin/app; exec 3>&-; /usr/bin/app")
}

fn b12_rename(node: &Node) -> anyhow::Result<()> {
    silent(node, "echo 'listen = 81' > /etc/app.conf.tmp; sync; mv /etc/app.conf.tmp /etc/app.conf")
}

fn b14_same_bytes(node: &Node) -> anyhow::Result<()> {
    silent(
        node,
        "cp -p /usr/bin/app /usr/bin/app.new && mv /usr/bin/app.new /usr/bin/app; /usr/bin/app",
    )
}

fn b21_symlinks(node: &Node) -> anyhow::Result<()> {
    silent(
        node,
        "ln -sf /proc/1/fd/1 /var/log/nginx/access.log\n\
         ln -sf /usr/bin/python3 /usr/bin/editor; /usr/bin/editor",
    )
}
