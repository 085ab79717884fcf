/* Stops the thread with the given number until standard input ends. */
#include <stdio.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    pid_t thread = argc > 1 ? atoi(argv[1]) : 0;
    int status;
    char byte;
    if (ptrace(PTRACE_SEIZE, thread, 0, 0) || ptrace(PTRACE_INTERRUPT, thread, 0, 0))
        return 1;
    if (waitpid(thread, &status, __WALL) != thread)
        return 1;
    puts("held");
    fflush(stdout);
    while (read(0, &byte, 1) > 0)
        ;
    ptrace(PTRACE_DETACH, thread, 0, 0);
    return 0;
}
