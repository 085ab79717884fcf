/* Maps code as programs do that generate it, or bring it along packed.
 *
 *   jit data FILE        makes FILE, removes it, and maps what it has written there
 *   jit load FILE        maps FILE as a library
 *   jit unpack FROM FILE writes FROM's bytes to FILE, maps it as a library, removes it
 */
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    char bytes[65536];
    memset(bytes, 0xc3, sizeof bytes);
    if (argc < 3)
        return 1;
    int is_data = !strcmp(argv[1], "data"), is_unpacked = !strcmp(argv[1], "unpack");
    const char *name = argv[is_unpacked ? 3 : 2];
    if (is_data || is_unpacked) {
        int out = open(name, O_RDWR | O_CREAT | O_TRUNC, 0700);
        int in = is_unpacked ? open(argv[2], O_RDONLY) : -1;
        ssize_t size = sizeof bytes;
        do {
            if (is_unpacked && (size = read(in, bytes, sizeof bytes)) <= 0)
                break;
            if (write(out, bytes, size) != size)
                return 2;
        } while (is_unpacked);
        close(out);
    }
    int fd = open(name, O_RDONLY);
    if (is_data)
        unlink(name);
    void *code = mmap(NULL, 4096, PROT_READ | PROT_EXEC, is_data ? MAP_SHARED : MAP_PRIVATE, fd, 0);
    if (code == MAP_FAILED)
        return 3;
    close(fd);
    usleep(50000);
    if (is_unpacked)
        unlink(name);
    usleep(400000);
    return 0;
}
