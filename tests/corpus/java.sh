# Java programs unpack a native library from their jar (JNA) and write archives of classes.
# Attack: critical exec.new /root/.cache/JNA/temp/jna1.tmp

export HOME=/root

round() {
    path=/usr/share/java/jna.jar:/usr/share/java/jna-native.jar
    for number in 1 2 3; do
        java -Djna.nosys=true -cp $path com.sun.jna.Native
        java -Djna.nosys=true -Djna.tmpdir=/tmp -cp $path com.sun.jna.Native
    done
    java -XX:ArchiveClassesAtExit=/tmp/classes.jsa -Djna.nosys=true -cp $path com.sun.jna.Native
    java -XX:SharedArchiveFile=/tmp/classes.jsa -Djna.nosys=true -cp $path com.sun.jna.Native
    rm /tmp/classes.jsa
}

attack() {
    mkdir -p /root/.cache/JNA/temp
    cp /.control/payload /root/.cache/JNA/temp/jna1.tmp
    /root/.cache/JNA/temp/jna1.tmp
}
