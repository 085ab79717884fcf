# Ansible configures the container it runs in, again and again.
# Attack: critical exec.new /root/.ansible/tmp/ansible-tmp-1.1-1-1/module

export HOME=/root LC_ALL=C.UTF-8

prepare() {
    mkdir -p /root/playbook
    cd /root/playbook
    echo 'listen = {{ port }}' >app.conf.j2
    cat >site.yml <<'END'
- hosts: localhost
  connection: local
  vars:
    port: 8080
  tasks:
    - name: directories
      file: { path: "{{ item }}", state: directory, mode: "0755" }
      loop: [/srv/app, /srv/app/bin, /srv/app/log]
    - name: settings
      template: { src: app.conf.j2, dest: /srv/app/app.conf }
    - name: a line
      lineinfile: { path: /srv/app/app.conf, line: "threads = 4" }
    - name: a file
      copy: { content: "text\n", dest: /srv/app/text }
    - name: a command
      command: /usr/bin/id
      changed_when: false
    - name: a shell command
      shell: sort /srv/app/app.conf | head -1
      changed_when: false
    - name: a script
      script: check.sh
      changed_when: false
    - name: what is there
      stat: { path: /srv/app/text }
    - name: clean
      file: { path: /srv/app/text, state: absent }
END
    printf '#!/bin/sh\ntest -e /srv/app/app.conf\n' >check.sh
}

round() {
    cd /root/playbook
    ansible-playbook -i localhost, site.yml
}

attack() {
    mkdir -p /root/.ansible/tmp/ansible-tmp-1.1-1-1
    cp /.control/payload /root/.ansible/tmp/ansible-tmp-1.1-1-1/module
    /root/.ansible/tmp/ansible-tmp-1.1-1-1/module
}
