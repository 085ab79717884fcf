/* Runs programs in the ways that leave no file name behind, and produces floods. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
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

/* Executes an open file COUNT times, each time in a child, and waits for it. */
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
        if (waitpid(child, &status, 0) != child || status != 0) {
            fprintf(stderr, "%d of %d: status %x\n", i, count, status);
            die("the program");
        }
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

/* Executes FILE as often as possible in each of PROCESSES processes; prints how often. */
static int storm(int seconds, int processes, char *file)
{
    char *arguments[] = { "a", "0", NULL };
    time_t end = time(NULL) + seconds;
    long count, all = 0;
    int results[2];
    if (pipe(results))
        die("pipe");
    for (int i = 0; i < processes; i++) {
        pid_t process = fork();
        if (process < 0)
            die("fork");
        if (process > 0)
            continue;
        for (count = 0; time(NULL) < end; count++) {
            int status;
            pid_t child = vfork();
            if (child == 0) {
                execve(file, arguments, environ);
                _exit(126);
            }
            if (child < 0 || waitpid(child, &status, 0) != child || status != 0)
                die("the program");
        }
        if (write(results[1], &count, sizeof count) != sizeof count)
            die("write");
        _exit(0);
    }
    close(results[1]);
    while (read(results[0], &count, sizeof count) == sizeof count)
        all += count;
    for (int i = 0; i < processes; i++) {
        int status;
        if (wait(&status) < 0 || status != 0)
            die("a process");
    }
    printf("%ld\n", all);
    return 0;
}

/* Writes COUNT different scripts; prints how many microseconds it took. */
static int scripts(int count, const char *directory)
{
    struct timespec begin, end;
    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (int i = 0; i < count; i++) {
        char name[4096], text[64];
        snprintf(name, sizeof name, "%s/%d", directory, i);
        int fd = open(name, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0755);
        int length = snprintf(text, sizeof text, "#!/bin/sh\n# %d\n", i);
        if (fd < 0 || write(fd, text, length) != length || close(fd))
            die(name);
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    printf("%ld\n", (end.tv_sec - begin.tv_sec) * 1000000 + (end.tv_nsec - begin.tv_nsec) / 1000);
    return 0;
}

/* Reports a page fault, and provides the page when a line arrives. */
static void *give_late(void *asked)
{
    struct uffd_msg message;
    struct uffdio_zeropage page = { .range = { .len = 4096 } };
    int fd = *(int *)asked;
    if (read(fd, &message, sizeof message) != sizeof message)
        die("userfaultfd");
    puts("asked");
    fflush(stdout);
    getchar();
    page.range.start = message.arg.pagefault.address & ~4095UL;
    ioctl(fd, UFFDIO_ZEROPAGE, &page);
    return NULL;
}

/* Executes FILE in ROOT. The page of its last argument is provided late. */
static int execute_late(const char *root, char *file)
{
    static int fd;
    pthread_t giver;
    struct uffdio_api api = { .api = UFFD_API };
    char *argument = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    struct uffdio_register memory = { .range = { .start = (unsigned long)argument, .len = 4096 },
                                      .mode = UFFDIO_REGISTER_MODE_MISSING };
    char *arguments[] = { file, "3600", argument, NULL };
    if (chroot(root) || chdir("/"))
        die(root);
    fd = syscall(SYS_userfaultfd, O_CLOEXEC);
    if (fd < 0 || ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &memory))
        die("userfaultfd");
    if (pthread_create(&giver, NULL, give_late, &fd))
        die("pthread_create");
    execve(file, arguments, environ);
    die(file);
    return 1;
}

static void *execute_late_here(void *file)
{
    execute_late("/", file);
    return NULL;
}

/* Checks whether FILE may be executed, or tries it; prints the error number. */
static int try(const char *file, int flags)
{
    char *arguments[] = { "a", NULL };
    int fd = open(file, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        die(file);
    printf("%d\n", execveat(fd, "", arguments, environ, AT_EMPTY_PATH | flags) ? errno : 0);
    return 0;
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
        /* The kernel does not execute a file that is open for writing. */
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
    /* given NUMBER FILE PROGRAM ARGUMENT...: the program inherits an open memfd. */
    if (!strcmp(how, "given")) {
        if (dup2(memfd_of("g", argv[3], MFD_CLOEXEC), atoi(argv[2])) < 0)
            die("dup2");
        execv(argv[4], argv + 4);
        die(argv[4]);
    }
    /* lock FILE GO PROGRAM ARGUMENT: once GO exists, one process reads a page of FILE from
     * the memory of another one. That one meanwhile waits for the lock of its memory, and
     * its child executes the program. */
    if (!strcmp(how, "lock")) {
        char name[64];
        int fd = open(argv[2], O_RDONLY);
        char *page = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, fd, 0);
        if (page == MAP_FAILED)
            die(argv[2]);
        snprintf(name, sizeof name, "%s.ready", argv[3]);
        close(open(name, O_CREAT | O_WRONLY, 0644));
        while (access(argv[3], F_OK))
            usleep(10000);
        snprintf(name, sizeof name, "/proc/%d/mem", getpid());
        /* This child comes first: the reader locks the memory that a fork has to copy. */
        if (fork() == 0) {
            usleep(1000000);
            execl(argv[4], argv[4], argv[5], NULL);
            die(argv[4]);
        }
        if (fork() == 0) {
            char byte;
            pread(open(name, O_RDONLY), &byte, 1, (off_t)page);
            return 0;
        }
        usleep(500000);
        mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        return 0;
    }
    /* late ROOT FILE */
    if (!strcmp(how, "late"))
        return execute_late(argv[2], argv[3]);
    /* late-thread FILE: the same without another root, by a thread that continues after
     * the first thread has ended. */
    if (!strcmp(how, "late-thread")) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, execute_late_here, argv[2]))
            die("pthread_create");
        pthread_exit(NULL);
    }
    /* check FILE: with AT_EXECVE_CHECK */
    if (!strcmp(how, "check"))
        return try(argv[2], 0x10000);
    /* try FILE */
    if (!strcmp(how, "try"))
        return try(argv[2], 0);
    /* fd FILE */
    if (!strcmp(how, "fd"))
        return run(open(argv[2], O_RDONLY | O_CLOEXEC), 1, "1");
    if (!strcmp(how, "self")) {
        execl("/proc/self/exe", "loader", "exit", NULL);
        die("/proc/self/exe");
    }
    /* map: runs code in a memfd and in anonymous memory, without an execve. */
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
    if (!strcmp(how, "storm"))
        return storm(atoi(argv[2]), atoi(argv[3]), argv[4]);
    if (!strcmp(how, "scripts"))
        return scripts(atoi(argv[2]), argv[3]);
    /* bench COUNT FILE: microseconds for each of COUNT executions */
    return 2;
}
