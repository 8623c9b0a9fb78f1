/* Makes the Nth call of a kind fail below a directory, in any program: LD_PRELOAD this.
 *
 * FAULT_DIR     only files below this directory count
 * FAULT_CALLS   names, separated by commas: open read write sync rename mkdir unlink truncate
 * FAULT_AT      which of them, from 1 on; 0 only writes "call KIND PATH" for each into the log
 * FAULT_ACTION  kill, short, or the number of an errno; "short" reads or writes half of what is asked for
 * FAULT_LOG     a file that gets "hit KIND PATH" when it happened
 *
 * A process that was forked sets them and calls read_faults().
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long calls;
static const char *folder, *kinds, *action, *record;
static long at;
enum { GO_ON, FAIL, HALF };

__attribute__((constructor)) void read_faults(void) {
    folder = getenv("FAULT_DIR"), kinds = getenv("FAULT_CALLS");
    action = getenv("FAULT_ACTION"), record = getenv("FAULT_LOG");
    at = getenv("FAULT_AT") ? atol(getenv("FAULT_AT")) : 0;
}

static void note(const char *text) {
    if (!record) return;
    long fd = syscall(SYS_openat, AT_FDCWD, record, O_WRONLY | O_CREAT | O_APPEND, 0644);
    if (fd < 0) return;
    syscall(SYS_write, fd, text, strlen(text));
    syscall(SYS_close, fd);
}

static int below(const char *path) { return folder && path && !strncmp(path, folder, strlen(folder)); }

static int place_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, PATH_MAX - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return 1;
}

static int decide(const char *kind, const char *path) {
    if (!below(path) || !kinds || !strstr(kinds, kind)) return GO_ON;
    char text[PATH_MAX + 64];
    if (at == 0) {
        snprintf(text, sizeof text, "call %s %s\n", kind, path);
        note(text);
        return GO_ON;
    }
    if (atomic_fetch_add(&calls, 1) + 1 != at || !action) return GO_ON;
    snprintf(text, sizeof text, "hit %s %s\n", kind, path);
    note(text);
    if (!strcmp(action, "kill")) kill(getpid(), SIGKILL);
    if (!strcmp(action, "short")) return HALF;
    errno = atoi(action);
    return FAIL;
}

static int decide_fd(const char *kind, int fd) {
    char path[PATH_MAX];
    return place_of(fd, path) ? decide(kind, path) : GO_ON;
}

static int decide_at(const char *kind, int folder_fd, const char *path) {
    char whole[2 * PATH_MAX];
    if (path[0] == '/' || folder_fd == AT_FDCWD) return decide(kind, path);
    if (!place_of(folder_fd, whole)) return GO_ON;
    snprintf(whole + strlen(whole), PATH_MAX, "/%s", path);
    return decide(kind, whole);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                                   \
    int name(const char *path, int flags, ...) {                     \
        va_list list;                                                \
        va_start(list, flags);                                       \
        mode_t mode = va_arg(list, mode_t);                          \
        va_end(list);                                                \
        return decide("open", path) == FAIL ? -1 : REAL(name)(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                 \
    int name(int fd, const char *path, int flags, ...) {             \
        va_list list;                                                \
        va_start(list, flags);                                       \
        mode_t mode = va_arg(list, mode_t);                          \
        va_end(list);                                                \
        return decide_at("open", fd, path) == FAIL ? -1 : REAL(name)(fd, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

#define HALVED(what, size) (what == HALF && (size) > 1 ? (size) / 2 : (size))

#define READ_OR_WRITE(kind, name, pointer)                           \
    ssize_t name(int fd, pointer data, size_t size) {                \
        int what = decide_fd(kind, fd);                              \
        return what == FAIL ? -1 : REAL(name)(fd, data, HALVED(what, size)); \
    }
READ_OR_WRITE("read", read, void *)
READ_OR_WRITE("write", write, const void *)

#define AT_OFFSET(kind, name, pointer, offset)                       \
    ssize_t name(int fd, pointer data, size_t size, offset place) {  \
        int what = decide_fd(kind, fd);                              \
        return what == FAIL ? -1 : REAL(name)(fd, data, HALVED(what, size), place); \
    }
AT_OFFSET("read", pread, void *, off_t)
AT_OFFSET("read", pread64, void *, off64_t)
AT_OFFSET("write", pwrite, const void *, off_t)
AT_OFFSET("write", pwrite64, const void *, off64_t)

#define VECTOR(name, offset)                                         \
    ssize_t name(int fd, const struct iovec *parts, int count, offset place) { \
        int what = decide_fd("read", fd);                            \
        struct iovec first = {parts[0].iov_base, HALVED(what, parts[0].iov_len)}; \
        if (what == FAIL) return -1;                                 \
        return what == HALF ? REAL(name)(fd, &first, 1, place) : REAL(name)(fd, parts, count, place); \
    }
VECTOR(preadv, off_t)
VECTOR(preadv64, off64_t)

#define VECTOR2(name, offset)                                        \
    ssize_t name(int fd, const struct iovec *parts, int count, offset place, int flags) { \
        int what = decide_fd("read", fd);                            \
        struct iovec first = {parts[0].iov_base, HALVED(what, parts[0].iov_len)}; \
        if (what == FAIL) return -1;                                 \
        return what == HALF ? REAL(name)(fd, &first, 1, place, flags) : REAL(name)(fd, parts, count, place, flags); \
    }
VECTOR2(preadv2, off_t)
VECTOR2(preadv64v2, off64_t)

#define SYNC(name)                                                   \
    int name(int fd) { return decide_fd("sync", fd) == FAIL ? -1 : REAL(name)(fd); }
SYNC(fsync)
SYNC(fdatasync)

#define TRUNCATE(name, offset)                                       \
    int name(int fd, offset size) { return decide_fd("truncate", fd) == FAIL ? -1 : REAL(name)(fd, size); }
TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

int rename(const char *from, const char *to) {
    return decide("rename", from) == FAIL ? -1 : REAL(rename)(from, to);
}
int renameat(int from_fd, const char *from, int to_fd, const char *to) {
    return decide_at("rename", from_fd, from) == FAIL ? -1 : REAL(renameat)(from_fd, from, to_fd, to);
}
int renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned flags) {
    return decide_at("rename", from_fd, from) == FAIL ? -1 : REAL(renameat2)(from_fd, from, to_fd, to, flags);
}
int mkdir(const char *path, mode_t mode) { return decide("mkdir", path) == FAIL ? -1 : REAL(mkdir)(path, mode); }
int unlink(const char *path) { return decide("unlink", path) == FAIL ? -1 : REAL(unlink)(path); }
int rmdir(const char *path) { return decide("unlink", path) == FAIL ? -1 : REAL(rmdir)(path); }
int unlinkat(int fd, const char *path, int flags) {
    return decide_at("unlink", fd, path) == FAIL ? -1 : REAL(unlinkat)(fd, path, flags);
}
