// Writes to an open file in ways that are no write(2): `writer mmap FILE`, with the
// file closed before the store, and `writer ring FILE`, by io_uring.
#include <fcntl.h>
#include <linux/io_uring.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static int fail(const char *what) {
    perror(what);
    return 1;
}

static int by_mapping(int file) {
    char *page = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (page == MAP_FAILED) return fail("mmap");
    memcpy(page + 100, "mmap", 4);
    if (msync(page, 4096, MS_SYNC)) return fail("msync");
    return 0;
}

static int by_ring(int file) {
    struct io_uring_params params = {0};
    int ring = syscall(SYS_io_uring_setup, 4, &params);
    if (ring < 0) return fail("io_uring_setup");
    size_t size = params.sq_off.array + params.sq_entries * sizeof(uint32_t);
    char *queue = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
    struct io_uring_sqe *entries =
        mmap(0, params.sq_entries * sizeof *entries, PROT_READ | PROT_WRITE, MAP_SHARED, ring,
             IORING_OFF_SQES);
    if (queue == MAP_FAILED || (void *)entries == MAP_FAILED) return fail("mmap of the ring");
    memset(entries, 0, sizeof *entries);
    entries->opcode = IORING_OP_WRITE;
    entries->fd = file;
    entries->addr = (uintptr_t) "io_uring";
    entries->len = 8;
    entries->off = 512;
    ((uint32_t *)(queue + params.sq_off.array))[0] = 0;
    __atomic_store_n((uint32_t *)(queue + params.sq_off.tail), 1, __ATOMIC_RELEASE);
    if (syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, 0, 0) != 1)
        return fail("io_uring_enter");
    return 0;
}

int main(int count, char **arguments) {
    if (count != 3) return 2;
    int file = open(arguments[2], O_RDWR);
    if (file < 0) return fail(arguments[2]);
    return strcmp(arguments[1], "ring") ? by_mapping(file) : by_ring(file);
}
