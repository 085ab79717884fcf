/*
 * A filesystem that a process serves, for tests of what waits for it.
 *
 *   fuse-server MODE MOUNT-POINT LOG NAME=SOURCE...
 *
 * Mounts a directory at MOUNT-POINT that holds each NAME with the content of SOURCE,
 * executable and read-only, and serves it until the connection is aborted. It needs
 * CAP_SYS_ADMIN and /dev/fuse, and speaks the kernel's protocol by itself.
 *
 * MODE names the processes whose requests are answered:
 *   all   every process
 *   own   processes of the server's own pid namespace; a process from outside waits
 *   mute  no process
 *   drop  every process except programs called driftd
 * SIGUSR1 changes the mode to own, SIGUSR2 to mute, SIGALRM to all (for new requests).
 *
 * Each request that is left unanswered is a line in LOG: its name, the pid, and the names
 * of the thread and of its program.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <unistd.h>

enum { MOST_FILES = 16, MOST_BYTES = 1 << 20 };

struct file {
    const char *name;
    char *bytes;
    size_t size;
};

static struct file files[MOST_FILES];
static unsigned count;
static int device, log_file;
static volatile sig_atomic_t mode;

static void set_mode(int signal)
{
    mode = signal == SIGUSR1 ? 'o' : signal == SIGUSR2 ? 'm' : 'a';
}

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void load(struct file *file, char *argument)
{
    char *source = strchr(argument, '=');
    if (!source) {
        fprintf(stderr, "not NAME=SOURCE: %s\n", argument);
        exit(2);
    }
    *source++ = 0;
    int fd = open(source, O_RDONLY);
    struct stat stat;
    if (fd < 0 || fstat(fd, &stat))
        fail(source);
    file->name = argument;
    file->bytes = malloc(stat.st_size + 1);
    while (file->size < (size_t)stat.st_size) {
        ssize_t done = read(fd, file->bytes + file->size, stat.st_size - file->size);
        if (done <= 0)
            fail(source);
        file->size += done;
    }
    close(fd);
}

static void answer(const struct fuse_in_header *in, int error, const void *bytes, size_t length)
{
    struct fuse_out_header out = {
        .len = sizeof out + length, .error = -error, .unique = in->unique
    };
    struct iovec parts[] = { { &out, sizeof out }, { (void *)bytes, length } };
    /* The process that asked may have ended meanwhile. */
    (void)!writev(device, parts, 2);
}

/* The root directory is node 1, the first file node 2. Nothing is cached. */
static struct fuse_attr attributes(uint64_t node)
{
    struct fuse_attr attr = { .ino = node, .nlink = 1, .blksize = 4096 };
    if (node == FUSE_ROOT_ID) {
        attr.mode = S_IFDIR | 0755;
    } else {
        attr.mode = S_IFREG | 0755;
        attr.size = files[node - 2].size;
        attr.blocks = (attr.size + 511) / 512;
    }
    return attr;
}

static void list(const struct fuse_in_header *in, const struct fuse_read_in *ask)
{
    char buffer[4096];
    size_t used = 0;
    for (uint64_t at = ask->offset; at < count; at++) {
        size_t length = strlen(files[at].name);
        size_t size = FUSE_DIRENT_ALIGN(FUSE_NAME_OFFSET + length);
        if (used + size > sizeof buffer || used + size > ask->size)
            break;
        struct fuse_dirent *entry = (void *)(buffer + used);
        memset(entry, 0, size);
        *entry = (struct fuse_dirent){
            .ino = at + 2, .off = at + 1, .namelen = length, .type = DT_REG
        };
        memcpy(entry->name, files[at].name, length);
        used += size;
    }
    answer(in, 0, buffer, used);
}

static void serve(const struct fuse_in_header *in, const void *body)
{
    uint64_t node = in->nodeid;
    if (node > count + 1) {
        answer(in, ESTALE, NULL, 0);
        return;
    }
    switch (in->opcode) {
    case FUSE_LOOKUP:
        for (unsigned at = 0; node == FUSE_ROOT_ID && at < count; at++)
            if (!strcmp(files[at].name, body)) {
                struct fuse_entry_out entry = { .nodeid = at + 2, .attr = attributes(at + 2) };
                answer(in, 0, &entry, sizeof entry);
                return;
            }
        answer(in, ENOENT, NULL, 0);
        return;
    case FUSE_GETATTR: {
        struct fuse_attr_out out = { .attr = attributes(node) };
        answer(in, 0, &out, sizeof out);
        return;
    }
    case FUSE_OPEN:
    case FUSE_OPENDIR: {
        struct fuse_open_out out = { .fh = 0 };
        answer(in, 0, &out, sizeof out);
        return;
    }
    case FUSE_READ: {
        const struct fuse_read_in *ask = body;
        if (node == FUSE_ROOT_ID) {
            answer(in, EISDIR, NULL, 0);
            return;
        }
        const struct file *file = &files[node - 2];
        size_t from = ask->offset < file->size ? ask->offset : file->size;
        size_t length = file->size - from < ask->size ? file->size - from : ask->size;
        answer(in, 0, file->bytes + from, length);
        return;
    }
    case FUSE_READDIR:
        list(in, body);
        return;
    case FUSE_STATFS: {
        struct fuse_statfs_out out = { .st = { .bsize = 4096, .namelen = 255, .frsize = 4096 } };
        answer(in, 0, &out, sizeof out);
        return;
    }
    case FUSE_ACCESS:
    case FUSE_FLUSH:
    case FUSE_RELEASE:
    case FUSE_RELEASEDIR:
        answer(in, 0, NULL, 0);
        return;
    case FUSE_GETXATTR:
    case FUSE_LISTXATTR:
        /* Not ENOSYS: the kernel would remember that and ask no more. */
        answer(in, ENODATA, NULL, 0);
        return;
    default:
        answer(in, ENOSYS, NULL, 0);
    }
}

static void begin(const struct fuse_in_header *in, const struct fuse_init_in *ask)
{
    struct fuse_init_out out = {
        .major = FUSE_KERNEL_VERSION,
        .minor = ask->minor < FUSE_KERNEL_MINOR_VERSION ? ask->minor : FUSE_KERNEL_MINOR_VERSION,
        .max_readahead = ask->max_readahead,
        .max_background = 16,
        .max_write = 4096,
        .time_gran = 1,
    };
    answer(in, 0, &out, sizeof out);
}

static const char *name_of(uint32_t opcode)
{
    switch (opcode) {
    case FUSE_LOOKUP: return "lookup";
    case FUSE_GETATTR: return "getattr";
    case FUSE_OPEN: return "open";
    case FUSE_OPENDIR: return "opendir";
    case FUSE_READ: return "read";
    case FUSE_READDIR: return "readdir";
    case FUSE_READDIRPLUS: return "readdirplus";
    case FUSE_READLINK: return "readlink";
    case FUSE_STATFS: return "statfs";
    case FUSE_GETXATTR: return "getxattr";
    case FUSE_LISTXATTR: return "listxattr";
    case 52: return "statx"; /* FUSE_STATX, which not every header has. */
    case FUSE_ACCESS: return "access";
    case FUSE_FLUSH: return "flush";
    default: {
        static char number[16];
        snprintf(number, sizeof number, "opcode-%u", opcode);
        return number;
    }
    }
}

/* The name of a process's program; empty if it cannot be seen from here. */
static const char *program_of(uint32_t pid)
{
    static char exe[4096];
    char link[32];
    snprintf(link, sizeof link, "/proc/%u/exe", pid);
    ssize_t length = pid ? readlink(link, exe, sizeof exe - 1) : 0;
    exe[length > 0 ? length : 0] = 0;
    const char *slash = strrchr(exe, '/');
    return slash ? slash + 1 : exe;
}

static const char *thread_of(uint32_t pid)
{
    static char name[32];
    char path[32];
    snprintf(path, sizeof path, "/proc/%u/comm", pid);
    int fd = pid ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    ssize_t length = fd < 0 ? 0 : read(fd, name, sizeof name - 1);
    if (fd >= 0)
        close(fd);
    name[length > 0 ? length - 1 : 0] = 0;
    return name;
}

/* Requests for which no process waits are always served. */
static int is_left(const struct fuse_in_header *in)
{
    switch (in->opcode) {
    case FUSE_RELEASE:
    case FUSE_RELEASEDIR:
    case FUSE_DESTROY:
        return 0;
    }
    return mode == 'm' || (mode == 'o' && in->pid == 0)
        || (mode == 'd' && !strcmp(program_of(in->pid), "driftd"));
}

int main(int argc, char **argv)
{
    if (argc < 4 || argc - 4 > MOST_FILES || !strchr("aomd", argv[1][0])) {
        fprintf(stderr, "usage: fuse-server all|own|mute|drop MOUNT-POINT LOG NAME=SOURCE...\n");
        return 2;
    }
    for (int at = 4; at < argc; at++)
        load(&files[count++], argv[at]);
    struct sigaction action = { .sa_handler = set_mode, .sa_flags = SA_RESTART };
    sigaction(SIGUSR1, &action, NULL);
    sigaction(SIGUSR2, &action, NULL);
    sigaction(SIGALRM, &action, NULL);
    log_file = open(argv[3], O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (log_file < 0)
        fail(argv[3]);
    device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    if (device < 0 && errno == ENOENT) {
        mknod("/dev/fuse", S_IFCHR | 0600, makedev(10, 229));
        device = open("/dev/fuse", O_RDWR | O_CLOEXEC);
    }
    if (device < 0)
        fail("/dev/fuse");
    char options[128];
    snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0,allow_other",
             device);
    if (mount("test", argv[2], "fuse", MS_NOSUID | MS_NODEV, options))
        fail(argv[2]);
    char *buffer = malloc(MOST_BYTES);
    for (;;) {
        ssize_t length = read(device, buffer, MOST_BYTES);
        if (length < 0) {
            if (errno == EINTR || errno == ENOENT || errno == EAGAIN)
                continue;
            /* ENODEV: unmounted, or aborted. */
            return 0;
        }
        struct fuse_in_header *in = (void *)buffer;
        void *body = buffer + sizeof *in;
        if (in->opcode == FUSE_INIT) {
            begin(in, body);
            mode = argv[1][0];
        } else if (in->opcode == FUSE_FORGET || in->opcode == FUSE_BATCH_FORGET
                   || in->opcode == FUSE_INTERRUPT) {
            /* Have no answer. */
        } else if (is_left(in)) {
            dprintf(log_file, "%s %u %s %s\n", name_of(in->opcode), in->pid,
                    thread_of(in->pid), program_of(in->pid));
        } else {
            serve(in, body);
        }
    }
}
