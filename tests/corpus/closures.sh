# Programs that make code while they run: ctypes, cffi, executable mappings of temporary
# files, profiles of node.
# Attack: critical exec.new /tmp/jit-1.dump

prepare() {
    mkdir -p /srv/app
    cat >/srv/app/closures.py <<'END'
import ctypes, mmap, os, tempfile
import cffi

compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_int))
numbers = (ctypes.c_int * 5)(5, 1, 4, 2, 3)
ctypes.CDLL(None).qsort(numbers, 5, 4, compare(lambda a, b: a[0] - b[0]))
assert list(numbers) == [1, 2, 3, 4, 5]

ffi = cffi.FFI()
ffi.cdef("void qsort(void *, size_t, size_t, int (*)(const void *, const void *));")
array = ffi.new("int[]", [3, 1, 2])
order = ffi.callback(
    "int(const void *, const void *)",
    lambda a, b: ffi.cast("int *", a)[0] - ffi.cast("int *", b)[0],
)
ffi.dlopen(None).qsort(array, 3, 4, order)
assert list(array) == [1, 2, 3]

# As libffi does where memory must not be writable and executable at once.
for directory in ["/tmp", "/var/tmp"]:
    for _ in range(5):
        file, name = tempfile.mkstemp(prefix="ffi", dir=directory)
        os.unlink(name)
        os.ftruncate(file, 65536)
        writable = mmap.mmap(file, 65536)
        code = mmap.mmap(file, 65536, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_EXEC)
        writable[:4] = b"\xc3\xc3\xc3\xc3"
        os.close(file)
END
    cat >/srv/app/hot.js <<'END'
let sum = 0;
for (let i = 0; i < 2e7; i++) sum = (sum + i * 3) % 1000003;
console.log(sum);
END
}

round() {
    cd /srv/app
    for number in 1 2 3; do
        python3 -c 'exec(open("/srv/app/closures.py").read())'
        python3 /srv/app/closures.py
    done
    mkdir -p /tmp/profile
    cd /tmp/profile
    node --perf-prof /srv/app/hot.js
    node --perf-basic-prof /srv/app/hot.js
    rm -r /tmp/profile
}

attack() {
    cp /.control/payload /tmp/jit-1.dump
    /tmp/jit-1.dump
}
