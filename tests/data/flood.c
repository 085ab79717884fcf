/*
 * The attacks of a hostile container, and a neighbour that measures their effect, for the
 * bench and the soak.
 *
 *   flood probe SECONDS          the neighbour: executes a program of its image, and ten
 *                                times a second a dropped program; prints how long each
 *                                execution of the first took, and when each dropped
 *                                program began
 *   flood WHAT SECONDS [TIMES]   does WHAT in four processes, for SECONDS or TIMES times
 *   flood sleep SECONDS
 *
 * The image has a small program that ends at once, /app/tiny.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static long long now(clockid_t clock)
{
    struct timespec t;
    clock_gettime(clock, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static int spawn(const char *path)
{
    pid_t pid;
    char *argv[] = { (char *)path, 0 };
    char *environment[] = { 0 };
    int status;
    if (posix_spawn(&pid, path, 0, 0, argv, environment))
        return 1;
    return waitpid(pid, &status, 0) != pid || status;
}

static char tiny[1 << 16];
static int tiny_size;

/* Writes a program with unique content. */
static int drop(const char *path, int number, long long length)
{
    char mark[64];
    int size = sprintf(mark, "%d %d", getpid(), number);
    int fd = open(path, O_CREAT | O_WRONLY | O_TRUNC, 0755);
    if (fd < 0 || write(fd, tiny, tiny_size) != tiny_size || write(fd, mark, size) != size)
        return 1;
    if (length && ftruncate(fd, length))
        return 1;
    return close(fd);
}

/* The same, with a few bytes in each 64 KiB, so that driftd must read the whole file. */
static int drop_large(const char *path, int number, long long length)
{
    if (drop(path, number, length))
        return 1;
    int fd = open(path, O_WRONLY);
    for (long long at = 1 << 16; at < length; at += 1 << 16)
        if (pwrite(fd, &number, sizeof number, at) != sizeof number)
            return 1;
    return close(fd);
}

static void flood(const char *what, int number, long long until, int times)
{
    char path[256], other[256];
    snprintf(path, sizeof path, "/tmp/%d", number);
    mkdir(path, 0755);
    if (!strcmp(what, "touched"))
        for (int i = 0; i < 10; i++) {
            snprintf(path, sizeof path, "/tmp/%d/%d", number, i);
            drop(path, i, 1000LL << 20);
        }
    for (int i = 0; now(CLOCK_MONOTONIC) < until && (!times || i < times); i++) {
        snprintf(path, sizeof path, "/tmp/%d/%d", number, i % 64);
        snprintf(other, sizeof other, "/tmp/%d/other%d", number, i % 64);
        if (!strcmp(what, "holes")) {
            if (!drop(path, i, 1000LL << 20))
                spawn(path);
        } else if (!strcmp(what, "touched")) {
            sleep(2);
            for (int n = 0; n < 10; n++) {
                snprintf(path, sizeof path, "/tmp/%d/%d", number, n);
                utimensat(AT_FDCWD, path, 0, 0);
            }
        } else if (!strcmp(what, "large")) {
            if (!drop_large(path, i, 15LL << 20))
                spawn(path);
        } else if (!strcmp(what, "execs")) {
            if (!drop(path, i, 0))
                spawn(path);
            unlink(path);
        } else if (!strcmp(what, "same")) {
            spawn("/app/tiny");
        } else if (!strcmp(what, "spread")) {
            /* One directory each, or their findings would be aggregated. */
            snprintf(path, sizeof path, "/tmp/%d/d%d", number, i);
            mkdir(path, 0755);
            strcat(path, "/program");
            if (!drop(path, i, 0))
                spawn(path);
        } else if (!strcmp(what, "scripts")) {
            int fd = open(path, O_CREAT | O_WRONLY | O_TRUNC, 0755);
            dprintf(fd, "#!/app/tiny\n%d %d\n", number, i);
            close(fd);
            spawn(path);
            unlink(path);
        } else if (!strcmp(what, "renames")) {
            if (i < 64)
                drop(path, i, 0);
            rename(path, other);
            rename(other, path);
            snprintf(path, sizeof path, "/tmp/%d/directory", number);
            mkdir(path, 0755);
            rename(path, other);
            rmdir(other);
        } else if (!strcmp(what, "mounts")) {
            snprintf(path, sizeof path, "/tmp/%d", number);
            if (mount("t", path, "tmpfs", 0, "size=1m"))
                continue;
            strcat(path, "/program");
            if (!drop(path, i, 0))
                spawn(path);
            snprintf(path, sizeof path, "/tmp/%d", number);
            while (umount(path) && now(CLOCK_MONOTONIC) < until)
                usleep(1000);
        } else {
            pid_t child = fork();
            if (!child) {
                if (!strcmp(what, "names")) {
                    prctl(PR_SET_NAME, "runc:[2:INIT]");
                    execl("/app/tiny", "/app/tiny", (char *)0);
                }
                _exit(0);
            }
            waitpid(child, 0, 0);
        }
    }
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    if (!strcmp(argv[1], "sleep"))
        return sleep(atoi(argv[2]));
    long long until = now(CLOCK_MONOTONIC) + atoi(argv[2]) * 1000000000LL;
    int fd = open("/app/tiny", O_RDONLY);
    tiny_size = read(fd, tiny, sizeof tiny);
    close(fd);
    if (strcmp(argv[1], "probe")) {
        for (int number = 0; number < 4; number++)
            if (!fork()) {
                flood(argv[1], number, until, argc > 3 ? atoi(argv[3]) : 0);
                _exit(0);
            }
        while (wait(0) > 0)
            ;
        return 0;
    }
    long long next = 0;
    for (int i = 0; now(CLOCK_MONOTONIC) < until; i++) {
        long long began = now(CLOCK_MONOTONIC);
        if (spawn("/app/tiny"))
            return 1;
        long long ended = now(CLOCK_MONOTONIC);
        printf("exec %lld %lld\n", ended - began, now(CLOCK_REALTIME));
        if (ended >= next) {
            char path[64];
            snprintf(path, sizeof path, "/tmp/probe%d", i);
            if (drop(path, i, 0))
                return 1;
            printf("%s %lld\n", path, now(CLOCK_REALTIME));
            if (spawn(path))
                return 1;
            next = ended + 100000000;
        }
        usleep(2000);
    }
    return 0;
}
