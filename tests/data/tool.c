/* Writes the byte behind "MARK=" to descriptor 3, and ends. x86-64, without libc. */
__attribute__((used)) static const char text[] = "MARK=G";

__attribute__((naked, noreturn)) void _start(void)
{
    __asm__ volatile("mov $1, %%eax\n"
                     "mov $3, %%edi\n"
                     "lea text+5(%%rip), %%rsi\n"
                     "mov $1, %%edx\n"
                     "syscall\n"
                     "mov $60, %%eax\n"
                     "xor %%edi, %%edi\n"
                     "syscall\n" ::
                         : "memory");
}
