/*
 * Changes a program of the image, runs it, and changes it back.
 *
 *   racer MODE ROUNDS TOOL [OTHER]
 *
 * The tool writes the byte behind "MARK=" to descriptor 3. Each line of the output is
 * the pid of one execution and the byte that it wrote: G as in the image, E for the
 * changed content, - for none.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static int channel[2];
static int spins;

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static pid_t start(const char *tool)
{
    pid_t pid = vfork();
    if (pid == 0) {
        char *arguments[] = {"tool", NULL};
        execve(tool, arguments, arguments + 1);
        _exit(127);
    }
    if (pid < 0)
        fail("vfork");
    return pid;
}

/* The byte that the tool wrote. By then it runs, and needs its file no more. */
static char began(void)
{
    char byte = '-';
    /* A tool that could not be run writes nothing. */
    for (long tries = 0; tries < 200000000; tries++) {
        if (read(channel[0], &byte, 1) == 1)
            return byte;
        if (!spins)
            usleep(1);
    }
    return '-';
}

static void end(pid_t pid, char byte)
{
    int status;
    waitpid(pid, &status, 0);
    printf("%d %c\n", pid, byte);
}

static size_t size;
static size_t mark;

static char *map(const char *tool)
{
    int fd;
    struct stat stat;
    /* A reader of an ended process keeps its program busy for a moment. */
    while ((fd = open(tool, O_RDWR)) < 0 && errno == ETXTBSY)
        usleep(100);
    if (fd < 0 || fstat(fd, &stat))
        fail(tool);
    size = stat.st_size;
    char *bytes = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (bytes == MAP_FAILED)
        fail("mmap");
    close(fd);
    if (!mark)
        mark = (char *)memmem(bytes, size, "MARK=", 5) - bytes + 5;
    return bytes;
}

/* Writes through a descriptor, as soon as no process runs the file any more. */
static void write_mark(const char *tool, char byte)
{
    int fd;
    while ((fd = open(tool, O_RDWR)) < 0)
        if (errno != ETXTBSY)
            fail(tool);
    if (pwrite(fd, &byte, 1, mark) != 1)
        fail("pwrite");
    close(fd);
}

/* Changes the file WRITTEN through a mapping for the time of one execution of TOOL. */
static void run_changed(const char *written, const char *tool)
{
    char *bytes = map(written);
    bytes[mark] = 'E';
    pid_t pid = start(tool);
    char byte = began();
    bytes[mark] = 'G';
    munmap(bytes, size);
    end(pid, byte);
}

static void copy(const char *from, const char *to)
{
    static char bytes[1 << 20];
    int in = open(from, O_RDONLY);
    unlink(to);
    int out = open(to, O_WRONLY | O_CREAT, 0755);
    ssize_t got = read(in, bytes, sizeof bytes);
    if (in < 0 || out < 0 || got <= 0 || write(out, bytes, got) != got)
        fail("copy");
    close(in);
    close(out);
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return 2;
    if (!strcmp(argv[1], "init")) {
        for (;;)
            pause();
    }
    if (argc < 4)
        return 2;
    const char *mode = argv[1], *tool = argv[3];
    int rounds = atoi(argv[2]);
    if (pipe2(channel, O_NONBLOCK))
        fail("pipe");
    if (channel[0] == 3) {
        channel[0] = fcntl(3, F_DUPFD_CLOEXEC, 10);
        close(3);
    }
    if (channel[1] != 3) {
        dup2(channel[1], 3);
        close(channel[1]);
    }
    fcntl(3, F_SETFL, 0);
    setvbuf(stdout, NULL, _IOFBF, 1 << 16);
    if (strchr(mode, '!'))
        spins = 1;

    char *held = NULL;
    if (strncmp(mode, "first", 5)) {
        char *bytes = map(tool);
        munmap(bytes, size);
    }
    for (int round = 0; round < rounds; round++) {
        if (!strncmp(mode, "held", 4)) {
            /* One mapping for all rounds. */
            if (!held)
                held = map(tool);
            held[mark] = 'E';
            pid_t pid = start(tool);
            char byte = began();
            held[mark] = 'G';
            end(pid, byte);
        } else if (!strncmp(mode, "brief", 5)) {
            /* A mapping for the time of one execution. */
            run_changed(tool, tool);
        } else if (!strncmp(mode, "first", 5)) {
            /* The same with another program of the image each time. */
            char path[64];
            snprintf(path, sizeof path, "%s/%d/tool", tool, round);
            run_changed(path, path);
        } else if (!strncmp(mode, "write", 5)) {
            /* Without a mapping, before and after. */
            write_mark(tool, 'E');
            pid_t pid = start(tool);
            char byte = began();
            write_mark(tool, 'G');
            end(pid, byte);
        } else if (!strncmp(mode, "unlink", 6)) {
            /* The executed file is replaced, and changed back after that. */
            char *bytes = map(tool);
            copy(tool, argv[4]);
            bytes[mark] = 'E';
            pid_t pid = start(tool);
            char byte = began();
            if (rename(argv[4], tool))
                fail("rename");
            bytes[mark] = 'G';
            munmap(bytes, size);
            end(pid, byte);
        } else if (!strncmp(mode, "swap", 4)) {
            /* The names are exchanged, and exchanged back. */
            if (round == 0) {
                copy(tool, argv[4]);
                write_mark(argv[4], 'E');
            }
            renameat2(AT_FDCWD, tool, AT_FDCWD, argv[4], RENAME_EXCHANGE);
            pid_t pid = start(tool);
            char byte = began();
            renameat2(AT_FDCWD, tool, AT_FDCWD, argv[4], RENAME_EXCHANGE);
            end(pid, byte);
        } else if (!strncmp(mode, "link", 4)) {
            /* Written through another name of the same file. */
            if (round == 0) {
                unlink(argv[4]);
                if (link(tool, argv[4]))
                    fail("link");
            }
            run_changed(argv[4], tool);
        } else if (!strncmp(mode, "punch", 5)) {
            /* The changed part is made a hole, and written again. */
            if (round == 0)
                copy(tool, argv[4]);
            write_mark(tool, 'E');
            pid_t pid = start(tool);
            char byte = began();
            int fd;
            while ((fd = open(tool, O_RDWR)) < 0)
                if (errno != ETXTBSY)
                    fail(tool);
            fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, mark & ~4095UL, 4096);
            close(fd);
            int from = open(argv[4], O_RDONLY);
            static char page[4096];
            fd = open(tool, O_RDWR);
            if (pread(from, page, 4096, mark & ~4095UL) <= 0)
                fail("pread");
            pwrite(fd, page, size - (mark & ~4095UL) < 4096 ? size - (mark & ~4095UL) : 4096,
                   mark & ~4095UL);
            close(from);
            close(fd);
            end(pid, byte);
        } else if (!strncmp(mode, "mount", 5)) {
            /* From a filesystem that is unmounted as soon as the tool has ended: b if it
             * is busy at first, B if it stays busy. */
            char name[] = "/mnt/tool";
            if (mount("none", "/mnt", "tmpfs", 0, NULL))
                fail("mount");
            copy(tool, name);
            pid_t pid = start(name);
            char byte = began();
            int status;
            waitpid(pid, &status, 0);
            for (int tries = 0; umount("/mnt"); tries++) {
                byte = 'b';
                usleep(100);
                if (tries == 2000) {
                    byte = 'B';
                    umount2("/mnt", MNT_DETACH);
                    break;
                }
            }
            printf("%d %c\n", pid, byte);
        } else if (!strncmp(mode, "touch", 5)) {
            /* Ordinary operations that do not change the content. */
            switch (mode[5]) {
            case '0': utimensat(AT_FDCWD, tool, NULL, 0); break;
            case '1': chmod(tool, 0555); chmod(tool, 0755); break;
            case '2': close(open(tool, O_RDWR)); break;
            case '3':
                copy(tool, argv[4]);
                chmod(argv[4], 0755);
                rename(argv[4], tool);
                break;
            }
            pid_t pid = start(tool);
            char byte = began();
            end(pid, byte);
        } else {
            return 2;
        }
    }
    /* Keep the mapping until driftd has searched for it. */
    if (held)
        usleep(300000);
    return fflush(stdout) ? 1 : 0;
}
