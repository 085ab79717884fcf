/* Runs programs in every way that leaves no name behind. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void copy(const char *from, int to)
{
    char buffer[65536];
    ssize_t length;
    int file = open(from, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        die(from);
    while ((length = read(file, buffer, sizeof buffer)) > 0)
        if (write(to, buffer, length) != length)
            die("write");
    close(file);
}

static int memfd_of(const char *name, const char *file, int flags)
{
    int fd = memfd_create(name, flags);
    if (fd < 0)
        die("memfd_create");
    copy(file, fd);
    return fd;
}

/* Executes what is open, COUNT times, each in a child that is waited for. */
static int run(int fd, int count, char *argument)
{
    char *arguments[] = { "a", argument, NULL };
    for (int i = 0; i < count; i++) {
        pid_t child = vfork();
        if (child < 0)
            die("vfork");
        if (child == 0) {
            execveat(fd, "", arguments, environ, AT_EMPTY_PATH);
            _exit(126);
        }
        int status;
        if (waitpid(child, &status, 0) != child || status != 0)
            die("the program");
    }
    return 0;
}

static void *execute(void *fd)
{
    char *arguments[] = { "a", "300", NULL };
    usleep(100 * 1000);
    execveat(*(int *)fd, "", arguments, environ, AT_EMPTY_PATH);
    die("execveat");
    return NULL;
}

int main(int argc, char **argv)
{
    const char *how = argc > 1 ? argv[1] : "exit";
    if (!strcmp(how, "exit"))
        return 0;
    /* memfd COUNT FILE ARGUMENT */
    if (!strcmp(how, "memfd"))
        return run(memfd_of("a", argv[3], MFD_CLOEXEC), atoi(argv[2]), argv[4]);
    /* script FILE */
    if (!strcmp(how, "script"))
        return run(memfd_of("s", argv[2], 0), 1, "x");
    /* tmpfile DIRECTORY COUNT FILE */
    if (!strcmp(how, "tmpfile")) {
        char name[64];
        int fd = open(argv[2], O_TMPFILE | O_RDWR | O_CLOEXEC, 0755);
        if (fd < 0)
            die("O_TMPFILE");
        copy(argv[4], fd);
        /* What is open for writing is not executed. */
        snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
        int again = open(name, O_RDONLY | O_CLOEXEC);
        if (again < 0)
            die(name);
        close(fd);
        return run(again, atoi(argv[3]), "1");
    }
    /* thread FILE: the first thread ends, and another one executes a memfd. */
    if (!strcmp(how, "thread")) {
        static int fd;
        pthread_t thread;
        fd = memfd_of("t", argv[2], MFD_CLOEXEC);
        if (pthread_create(&thread, NULL, execute, &fd))
            die("pthread_create");
        pthread_exit(NULL);
    }
    /* fd FILE */
    if (!strcmp(how, "fd"))
        return run(open(argv[2], O_RDONLY | O_CLOEXEC), 1, "1");
    if (!strcmp(how, "self")) {
        execl("/proc/self/exe", "loader", "exit", NULL);
        die("/proc/self/exe");
    }
    /* map: code in a memfd and in memory that is no file, run without an execve. */
    if (!strcmp(how, "map")) {
        static const unsigned char code[] = { 0xc3 }; /* ret */
        int fd = memfd_create("doublemapper", MFD_CLOEXEC);
        if (fd < 0 || ftruncate(fd, 4096))
            die("memfd");
        char *writable = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        char *runs = mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
        char *both = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC,
                          MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (writable == MAP_FAILED || runs == MAP_FAILED || both == MAP_FAILED)
            die("mmap");
        memcpy(writable, code, sizeof code);
        memcpy(both, code, sizeof code);
#ifdef __x86_64__
        ((void (*)(void))runs)();
        ((void (*)(void))both)();
#endif
        return 0;
    }
    /* bench COUNT FILE: microseconds for each of COUNT executions */
    return 2;
}
