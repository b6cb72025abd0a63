/* A TLS sink on epoll: what the same OpenSSL costs without Python.
 *
 * bench/sink.py compiles it into a shared library and passes the OpenSSL that pyOpenSSL uses: functions by address,
 * because that OpenSSL is linked statically into an extension module and exports no symbols.
 */
#define _GNU_SOURCE /* accept4 */
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

/* The order is that of FUNCTIONS in sink.py. */
struct openssl {
    void *(*SSL_new)(void *context);
    void (*SSL_free)(void *ssl);
    void (*SSL_set_accept_state)(void *ssl);
    int (*SSL_do_handshake)(void *ssl);
    int (*SSL_read)(void *ssl, void *buffer, int size);
    int (*SSL_set_fd)(void *ssl, int fd);
    void (*SSL_set_bio)(void *ssl, void *in, void *out);
    void *(*BIO_new)(const void *method);
    const void *(*BIO_s_mem)(void);
    int (*BIO_read)(void *bio, void *buffer, int size);
    int (*BIO_write)(void *bio, const void *buffer, int size);
    void (*ERR_clear_error)(void);
};

enum { ON_MEMORY = 0, ON_DESCRIPTOR = 1 };
enum { CIPHERTEXT = 256 * 1024, PLAINTEXT = 16 * 1024, CONNECTIONS = 64 };

struct connection {
    void *ssl, *in, *out; /* in and out are NULL on a descriptor */
    int fd, shaken;
};

struct result {
    double cpu_seconds; /* from the end of the first handshake to the end of the last connection */
    int64_t bytes;
};

static char ciphertext[CIPHERTEXT], plaintext[PLAINTEXT];

static double cpu_seconds(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_utime.tv_sec + usage.ru_stime.tv_sec + (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) / 1e6;
}

static int flush(const struct openssl *openssl, struct connection *connection)
{
    char out[16384];
    int count;
    while (connection->out && (count = openssl->BIO_read(connection->out, out, sizeof out)) > 0)
        if (send(connection->fd, out, count, MSG_NOSIGNAL) != count)
            return -1;
    return 0;
}

static struct connection *take(const struct openssl *openssl, void *context, int listening, int mode, int epoll)
{
    struct connection *connection = calloc(1, sizeof *connection);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = connection};
    connection->fd = accept4(listening, NULL, NULL, SOCK_NONBLOCK);
    connection->ssl = openssl->SSL_new(context);
    openssl->SSL_set_accept_state(connection->ssl);
    if (mode == ON_DESCRIPTOR) {
        openssl->SSL_set_fd(connection->ssl, connection->fd);
    } else {
        connection->in = openssl->BIO_new(openssl->BIO_s_mem());
        connection->out = openssl->BIO_new(openssl->BIO_s_mem());
        openssl->SSL_set_bio(connection->ssl, connection->in, connection->out);
    }
    epoll_ctl(epoll, EPOLL_CTL_ADD, connection->fd, &event);
    return connection;
}

/* Returns 0 when the connection has ended. */
static int serve(const struct openssl *openssl, struct connection *connection, struct result *result)
{
    int count;
    if (connection->in) {
        ssize_t got = recv(connection->fd, ciphertext, sizeof ciphertext, 0);
        if (got <= 0)
            return got < 0 && errno == EAGAIN;
        openssl->BIO_write(connection->in, ciphertext, got);
    }
    openssl->ERR_clear_error();
    if (!connection->shaken) {
        connection->shaken = openssl->SSL_do_handshake(connection->ssl) == 1;
        if (flush(openssl, connection))
            return 0;
        if (!connection->shaken)
            return 1;
        if (!result->cpu_seconds)
            result->cpu_seconds = -cpu_seconds();
    }
    while ((count = openssl->SSL_read(connection->ssl, plaintext, sizeof plaintext)) > 0)
        result->bytes += count;
    /* A close_notify gives 0 on a descriptor; a memory BIO that has run dry gives -1. */
    return count < 0;
}

/* Serve this many connections to their ends. Returns 0, or an errno. */
int sink(const struct openssl *openssl, void *context, int listening, int mode, int connections, struct result *result)
{
    struct epoll_event events[CONNECTIONS], event = {.events = EPOLLIN, .data.ptr = NULL};
    int epoll = epoll_create1(0), ended = 0;
    memset(result, 0, sizeof *result);
    if (epoll < 0 || epoll_ctl(epoll, EPOLL_CTL_ADD, listening, &event) < 0)
        return errno;
    while (ended < connections) {
        int ready = epoll_wait(epoll, events, CONNECTIONS, -1);
        for (int i = 0; i < ready; i++) {
            struct connection *connection = events[i].data.ptr;
            if (!connection) {
                take(openssl, context, listening, mode, epoll);
            } else if (!serve(openssl, connection, result)) {
                openssl->SSL_free(connection->ssl); /* and its BIOs */
                close(connection->fd);
                free(connection);
                ended++;
            }
        }
    }
    close(epoll);
    result->cpu_seconds += cpu_seconds();
    return 0;
}
