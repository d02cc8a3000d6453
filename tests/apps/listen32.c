// Listens on 127.0.0.1, on the port that is the argument, by system calls of the i386 interface, and waits. cc(1) builds it
// for x86_64: int 0x80 takes the lower halves of the registers, so all memory lies below 4 GiB.
#include <arpa/inet.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static long call(long number, long a, long b, long c) {
    long result;
    __asm__ volatile("int $0x80"
                     : "=a"(result)
                     : "a"(number), "b"(a), "c"(b), "d"(c)
                     : "memory", "r8", "r9", "r10", "r11");
    return result;
}

int main(int count, char **words) {
    enum { SOCKET = 359, BIND = 361, LISTEN = 363 };
    struct sockaddr_in *address =
        mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
    if (count != 2 || address == MAP_FAILED) {
        return 2;
    }
    address->sin_family = AF_INET;
    address->sin_port = htons(atoi(words[1]));
    address->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    long listener = call(SOCKET, AF_INET, SOCK_STREAM, 0);
    if (listener < 0 || call(BIND, listener, (long)address, sizeof *address) < 0 || call(LISTEN, listener, 64, 0) < 0) {
        return 1;
    }
    pause();
}
