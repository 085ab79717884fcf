# Administration: accounts, capabilities, repositories with hooks, copies of programs, modes.
# Reported: high file.persistence /etc/
# Reported: high file.privileged /opt/backup/web
# Attack: high file.privileged /usr/bin/perl

export HOME=/root

# An account is made once, and not every minute.
prepare() {
    useradd -m -s /bin/bash user
    usermod -aG adm user
}

round() {
    git config --global user.name user
    git config --global user.email user@example.test
    rm -rf /root/repository /root/clone /opt/backup /opt/busybox /srv/files
    git init -q /root/repository
    cd /root/repository
    for file in 1 2 3; do echo $file >$file; done
    git add .
    git commit -q -m files
    git clone -q /root/repository /root/clone
    cp /root/clone/.git/hooks/pre-commit.sample /root/clone/.git/hooks/pre-commit
    cp -r /usr/sbin /opt/backup
    mkdir -p /opt/busybox /srv/files
    busybox --install /opt/busybox
    for applet in ls cat date; do /opt/busybox/$applet /dev/null || true; done
    cp /usr/sbin/nginx /opt/backup/web
    setcap cap_net_bind_service=ep /opt/backup/web
    for file in $(seq 200); do echo $file >/srv/files/$file.txt; done
    chmod -R a+rX,ug+s /srv/files
    chown -R user /srv/files
}

attack() {
    chmod u+s /usr/bin/perl
}
