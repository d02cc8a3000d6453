// A server whose socket has something before bind. Usage: own_socket PORT|PATH WORD...
//
// level, edge, oneshot, exclusive: an epoll that watches it; two: a second one; nested: one in another one
// duplicate: it listens and accepts by a duplicate, and closes the number that it has bound
// timeout:   SO_RCVTIMEO, and SIGINT only sets a flag that is looked at after a time-out
// options:   socket options; it ends with status 1 if one isn't there after listen
// thread:    another thread binds
// killed:    before that, processes that are killed while they bind sockets that they watch
// dies:      SIGUSR1 has it bind another such socket, amid which it is killed
// ipv6, unix: the family
// traced:    its parent traces it
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

static const uint64_t DATA = 0x1122334455667788;
static char **words;
static union { struct sockaddr any; struct sockaddr_in v4; struct sockaddr_in6 v6; struct sockaddr_un path; } address;
static socklen_t length;
static int s;
static volatile sig_atomic_t stops;

static int has(const char *word) {
    for (char **w = words; *w; w++) if (!strcmp(*w, word)) return 1;
    return 0;
}

static int check(int result, const char *what) {
    if (result < 0) { perror(what); exit(1); }
    return result;
}

static const struct { const char *name; int level, option, value; } OPTIONS[] = {
    {"IP_TOS", IPPROTO_IP, IP_TOS, 0x10}, // sets a priority too
    {"SO_KEEPALIVE", SOL_SOCKET, SO_KEEPALIVE, 1}, {"SO_PRIORITY", SOL_SOCKET, SO_PRIORITY, 5},
    {"SO_RCVLOWAT", SOL_SOCKET, SO_RCVLOWAT, 2}, {"SO_OOBINLINE", SOL_SOCKET, SO_OOBINLINE, 1},
    {"TCP_NODELAY", IPPROTO_TCP, TCP_NODELAY, 1}, {"TCP_MAXSEG", IPPROTO_TCP, TCP_MAXSEG, 1000},
    {"TCP_KEEPIDLE", IPPROTO_TCP, TCP_KEEPIDLE, 77}, {"TCP_KEEPINTVL", IPPROTO_TCP, TCP_KEEPINTVL, 7},
    {"TCP_KEEPCNT", IPPROTO_TCP, TCP_KEEPCNT, 4}, {"TCP_USER_TIMEOUT", IPPROTO_TCP, TCP_USER_TIMEOUT, 7000},
    {"TCP_FASTOPEN", IPPROTO_TCP, TCP_FASTOPEN, 9}, {"TCP_DEFER_ACCEPT", IPPROTO_TCP, TCP_DEFER_ACCEPT, 1},
    {"TCP_LINGER2", IPPROTO_TCP, TCP_LINGER2, 11}, {"TCP_SAVE_SYN", IPPROTO_TCP, TCP_SAVE_SYN, 1},
    {"TCP_NOTSENT_LOWAT", IPPROTO_TCP, TCP_NOTSENT_LOWAT, 9999},
    {"IP_TTL", IPPROTO_IP, IP_TTL, 63}, {"IP_MTU_DISCOVER", IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT},
    {"SO_RCVBUF", SOL_SOCKET, SO_RCVBUF, 20000}, {"SO_SNDBUF", SOL_SOCKET, SO_SNDBUF, 30000},
};
enum { COUNT = sizeof OPTIONS / sizeof *OPTIONS };
static const struct linger LINGER = {1, 3};
static const struct timeval SEVEN = {7, 0};

static void set_options(void) {
    for (int i = 0; i < COUNT; i++)
        check(setsockopt(s, OPTIONS[i].level, OPTIONS[i].option, &OPTIONS[i].value, sizeof(int)), OPTIONS[i].name);
    check(setsockopt(s, SOL_SOCKET, SO_LINGER, &LINGER, sizeof LINGER), "SO_LINGER");
    check(setsockopt(s, SOL_SOCKET, SO_SNDTIMEO, &SEVEN, sizeof SEVEN), "SO_SNDTIMEO");
    check(setsockopt(s, IPPROTO_TCP, TCP_CONGESTION, "reno", 4), "TCP_CONGESTION");
}

static void expect(const char *name, int level, int option, const void *wanted, socklen_t len) {
    char value[64] = {0};
    socklen_t size = sizeof value;
    check(getsockopt(s, level, option, value, &size), name);
    if (memcmp(value, wanted, len)) { printf("%s is lost\n", name); exit(1); }
}

static void check_options(void) {
    for (int i = 0; i < COUNT; i++) {
        int wanted = OPTIONS[i].value, is_buffer = OPTIONS[i].option == SO_RCVBUF || OPTIONS[i].option == SO_SNDBUF;
        if (OPTIONS[i].level == SOL_SOCKET && is_buffer) wanted *= 2;
        expect(OPTIONS[i].name, OPTIONS[i].level, OPTIONS[i].option, &wanted, sizeof wanted);
    }
    expect("SO_LINGER", SOL_SOCKET, SO_LINGER, &LINGER, sizeof LINGER);
    expect("SO_SNDTIMEO", SOL_SOCKET, SO_SNDTIMEO, &SEVEN, sizeof SEVEN);
    expect("TCP_CONGESTION", IPPROTO_TCP, TCP_CONGESTION, "reno", 5);
}

static void *binds(void *unused) {
    check(bind(s, &address.any, length), "bind");
    return unused;
}

static void answer(int connection) {
    struct timeval five = {5, 0};
    char request[4096], body[128], text[512];
    setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &five, sizeof five);
    if (read(connection, request, sizeof request) > 0) {
        int n = snprintf(body, sizeof body, "pid=%d generation=%s slot=%s\n", getpid(), getenv("REUSE_RUN_GENERATION"), getenv("REUSE_RUN_SLOT"));
        n = snprintf(text, sizeof text, "HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", n, body);
        if (write(connection, text, n) != n) perror("write");
    }
    close(connection);
}

// The child serves. It ends with its parent.
static void be_traced(void) {
    int child = check(fork(), "fork"), status;
    if (child == 0) {
        check(ptrace(PTRACE_TRACEME, 0, NULL, NULL), "ptrace");
        raise(SIGSTOP);
        return;
    }
    check(waitpid(child, &status, 0), "waitpid");
    check(ptrace(PTRACE_SETOPTIONS, child, NULL, PTRACE_O_EXITKILL), "ptrace");
    for (int signal = 0;; signal = WSTOPSIG(status)) {
        ptrace(PTRACE_CONT, child, NULL, (long)signal);
        check(waitpid(child, &status, 0), "waitpid");
        if (!WIFSTOPPED(status)) exit(1);
    }
}

static void *kills_it(void *after) {
    for (volatile long i = (long)after; i > 0; i--) {}
    kill(getpid(), SIGKILL);
    return NULL;
}

static volatile int is_bound;

// As soon as the main thread is traced, or a moment later.
static void *kills_traced(void *after) {
    char text[4096] = "";
    int status = open("/proc/self/status", O_RDONLY);
    while (!is_bound && (!strstr(text, "TracerPid:") || strstr(text, "TracerPid:\t0\n")))
        if (pread(status, text, sizeof text - 1, 0) < 0) break;
    return kills_it(after);
}

static void die_in_bind(void *(*kills)(void *), long after) {
    int own = socket(AF_INET, SOCK_STREAM, 0), epoll = epoll_create1(0);
    struct epoll_event event = {EPOLLIN, {.u64 = DATA}};
    check(epoll_ctl(epoll, EPOLL_CTL_ADD, own, &event), "epoll_ctl");
    pthread_t thread;
    pthread_create(&thread, NULL, kills, (void *)after);
    bind(own, &address.any, length);
    is_bound = 1;
    pause();
}

static void dies(int signal) {
    (void)signal;
    address.v4.sin_addr.s_addr = htonl(INADDR_LOOPBACK + 1);
    die_in_bind(kills_traced, atol(getenv("REUSE_RUN_SLOT")) * 1000);
}

static void be_killed_in_bind(void) {
    for (long i = 0; i < 60; i++) {
        int child = check(fork(), "fork");
        if (child == 0) die_in_bind(kills_it, i * 5000);
        check(waitpid(child, NULL, 0), "waitpid");
    }
}

static void stop(int signal) { (void)signal; stops = 1; }

int main(int argc, char **argv) {
    if (argc < 2) return 2;
    words = argv + 2;
    if (has("traced")) be_traced();
    int family = has("unix") ? AF_UNIX : has("ipv6") ? AF_INET6 : AF_INET, one = 1;
    if (family == AF_UNIX) {
        address.path = (struct sockaddr_un){.sun_family = AF_UNIX};
        strncpy(address.path.sun_path, argv[1], sizeof address.path.sun_path - 1);
        length = sizeof address.path;
        unlink(argv[1]);
    } else if (family == AF_INET6) {
        address.v6 = (struct sockaddr_in6){.sin6_family = AF_INET6, .sin6_port = htons(atoi(argv[1])), .sin6_addr = in6addr_loopback};
        length = sizeof address.v6;
    } else {
        address.v4 = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(atoi(argv[1])), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        length = sizeof address.v4;
    }
    if (has("killed")) be_killed_in_bind();
    if (has("dies")) signal(SIGUSR1, dies);
    unsigned flag = has("edge") ? EPOLLET : has("oneshot") ? EPOLLONESHOT : has("exclusive") ? EPOLLEXCLUSIVE : 0;
    int watches = flag || has("level");
    s = check(socket(family, SOCK_STREAM | (watches ? SOCK_NONBLOCK : 0), 0), "socket");
    setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (has("options")) set_options();
    if (has("timeout")) {
        struct timeval time = {0, 200000};
        setsockopt(s, SOL_SOCKET, SO_RCVTIMEO, &time, sizeof time);
        struct sigaction action = {.sa_handler = stop, .sa_flags = SA_RESTART};
        sigaction(SIGINT, &action, NULL);
    }
    int duplicate = has("duplicate") ? fcntl(s, F_DUPFD_CLOEXEC, 100) : s;
    struct epoll_event event = {EPOLLIN | flag, {.u64 = DATA}};
    int epolls[2] = {epoll_create1(EPOLL_CLOEXEC), epoll_create1(0)}, count = has("two") ? 2 : 1;
    for (int i = 0; watches && i < count; i++) check(epoll_ctl(epolls[i], EPOLL_CTL_ADD, duplicate, &event), "epoll_ctl");
    if (has("nested")) {
        struct epoll_event any = {EPOLLIN, {.u64 = DATA}};
        check(epoll_ctl(epolls[1], EPOLL_CTL_ADD, epolls[0], &any), "epoll_ctl of an epoll");
    }
    if (has("thread")) {
        pthread_t thread;
        pthread_create(&thread, NULL, binds, NULL);
        pthread_join(thread, NULL);
    } else {
        binds(NULL);
    }
    if (has("duplicate")) { close(s); s = duplicate; }
    check(listen(s, 128), "listen");
    if (has("options")) check_options();
    for (int turn = 0; !stops; turn++) {
        if (watches) {
            // With two epolls, both have to know of the connection.
            for (int i = 0; i < count; i++) {
                struct epoll_event got;
                if (has("nested")) check(epoll_wait(epolls[1], &got, 1, -1), "epoll_wait");
                if (check(epoll_wait(epolls[i], &got, 1, -1), "epoll_wait") && got.data.u64 != DATA) {
                    printf("data is lost\n");
                    exit(1);
                }
            }
        }
        int connection;
        do {
            connection = accept4(s, NULL, NULL, 0);
            if (connection >= 0) answer(connection);
        } while (watches && connection >= 0);
        if (has("oneshot")) for (int i = 0; i < count; i++) check(epoll_ctl(epolls[i], EPOLL_CTL_MOD, s, &event), "epoll_ctl again");
    }
}
