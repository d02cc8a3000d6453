/* A server as built in Alpine: it is linked to musl and runs where there is no other libc. */
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int main(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(8080)};
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 128)) {
        perror("bind");
        return 1;
    }
    char body[100], request[4096];
    int length = snprintf(body, sizeof body, "pid=%d generation=%s slot=%s\n", getpid(),
                          getenv("REUSE_RUN_GENERATION"), getenv("REUSE_RUN_SLOT"));
    for (;;) {
        int connection = accept(listener, NULL, NULL);
        read(connection, request, sizeof request);
        dprintf(connection, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", length, body);
        close(connection);
    }
}
