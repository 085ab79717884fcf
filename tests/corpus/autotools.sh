# Builds a program with autotools: configure, make, make check, make install.
# Attack: critical exec.new /root/hello/conftest

round() {
    cd /root
    rm -rf hello
    tar xf /usr/src/corpus/hello_*.orig.tar.gz
    mv hello-* hello
    cd hello
    FORCE_UNSAFE_CONFIGURE=1 ./configure
    make
    make check
    make install
    hello | grep 'Hello, world!'
}

attack() {
    cp /.control/payload /root/hello/conftest
    /root/hello/conftest
}
