/* Counts the file operations of a process below one folder and lets one of them fail or be the last.

   Preloaded (LD_PRELOAD) it stands between a program and the C library. Nothing happens until faults_arm is called.
   The operation number `at` (from 1; 0: only count) meets its fate:
     'k'  the process is killed before it; of a write, the first half still happens
     's'  ENOSPC: of a write, the first half still happens; the disk stays full for whatever would grow it
     'e'  EIO, once
   Each operation is logged as `number<TAB>name<TAB>path[<TAB>new path or size]`. Reads are not operations. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define LINE (2 * PATH_MAX + 64)
#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static char folder[PATH_MAX];
static size_t folder_length;
static int wanted, counted, full, log_file = -1;
static char kind;
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;

void faults_arm(const char *below, int at, char fate, const char *log) {
    folder_length = strlen(below);
    memcpy(folder, below, folder_length + 1);
    wanted = at;
    kind = fate;
    counted = full = 0;
    log_file = (int)syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
}

static int inside(const char *path) {
    return folder_length && !strncmp(path, folder, folder_length) &&
           (path[folder_length] == '/' || path[folder_length] == 0);
}

static int path_of(int handle, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, out, PATH_MAX - 1);
    out[length < 0 ? 0 : length] = 0;
    return length > 0;
}

static void absolute(int at, const char *path, char *out) {
    char base[PATH_MAX] = "";
    if (path[0] == '/') {
        snprintf(out, PATH_MAX, "%s", path);
        return;
    }
    if (at == AT_FDCWD)
        syscall(SYS_getcwd, base, sizeof base);
    else
        path_of(at, base);
    if (snprintf(out, PATH_MAX, "%s/%s", base, path) >= PATH_MAX)
        out[0] = 0;
}

/* 0: go on; 1: fail with errno; 2: write half, then fail or die. `grows`: a full disk refuses it. */
static int meets(const char *name, const char *path, const char *other, int grows, int splits) {
    if (!inside(path) && !(other && inside(other)))
        return 0;
    pthread_mutex_lock(&guard);
    int number = ++counted;
    char line[LINE];
    int length = snprintf(line, sizeof line, "%d\t%s\t%s%s%s\n", number, name, path, other ? "\t" : "", other ? other : "");
    if (log_file >= 0)
        syscall(SYS_write, log_file, line, length);
    int hit = number == wanted, refused = full && grows;
    full |= hit && kind == 's';
    pthread_mutex_unlock(&guard);
    if (hit && splits && kind != 'e')
        return 2;
    if (hit && kind == 'k') {
        syscall(SYS_kill, getpid(), SIGKILL);
        pause();
    }
    if (hit || refused)
        errno = kind == 'e' ? EIO : ENOSPC;
    return hit || refused;
}

static int meets_handle(const char *name, int handle, int grows, int splits) {
    char path[PATH_MAX];
    return folder_length && path_of(handle, path) ? meets(name, path, NULL, grows, splits) : 0;
}

static int meets_path(const char *name, int at, const char *path, int grows) {
    char full_path[PATH_MAX];
    if (!folder_length || !path)
        return 0;
    absolute(at, path, full_path);
    return meets(name, full_path, NULL, grows, 0);
}

static int meets_paths(const char *name, int from_at, const char *from, int to_at, const char *to) {
    char one[PATH_MAX], two[PATH_MAX];
    if (!folder_length)
        return 0;
    absolute(from_at, from, one);
    absolute(to_at, to, two);
    return meets(name, one, two, 1, 0);
}

/* The half of a write that still happens: a death follows it, or a short count, as a full disk gives. */
static ssize_t half(ssize_t written) {
    if (kind == 'k') {
        syscall(SYS_kill, getpid(), SIGKILL);
        pause();
    }
    if (written <= 0) {
        errno = ENOSPC;
        return -1;
    }
    return written;
}

static int opens_for_writing(int flags) {
    return (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);
}

#define MODE_OF(flags)                                                                                                 \
    int mode = 0;                                                                                                      \
    if ((flags) & (O_CREAT | __O_TMPFILE)) {                                                                           \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode = va_arg(more, int);                                                                                      \
        va_end(more);                                                                                                  \
    }

#define OPEN(name, ...)                                                                                                \
    int name(const char *path, int flags, ...) {                                                                       \
        MODE_OF(flags)                                                                                                 \
        if (opens_for_writing(flags) && meets_path("open", AT_FDCWD, path, flags & O_CREAT))                           \
            return -1;                                                                                                 \
        return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);                                                  \
    }
#define OPENAT(name)                                                                                                   \
    int name(int at, const char *path, int flags, ...) {                                                               \
        MODE_OF(flags)                                                                                                 \
        if (opens_for_writing(flags) && meets_path("open", at, path, flags & O_CREAT))                                 \
            return -1;                                                                                                 \
        return (int)syscall(SYS_openat, at, path, flags, mode);                                                        \
    }
#define CREAT(name)                                                                                                    \
    int name(const char *path, mode_t mode) {                                                                          \
        if (meets_path("open", AT_FDCWD, path, 1))                                                                     \
            return -1;                                                                                                 \
        return (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, mode);                           \
    }
#define FOPEN(name)                                                                                                    \
    FILE *name(const char *path, const char *mode) {                                                                   \
        if (strpbrk(mode, "wa+") && meets_path("open", AT_FDCWD, path, 1))                                             \
            return NULL;                                                                                               \
        return NEXT(name)(path, mode);                                                                                 \
    }
/* glibc's fortified calls take no mode: they never create */
#define OPEN_2(name)                                                                                                   \
    int name(const char *path, int flags) {                                                                            \
        if (opens_for_writing(flags) && meets_path("open", AT_FDCWD, path, 0))                                         \
            return -1;                                                                                                 \
        return (int)syscall(SYS_openat, AT_FDCWD, path, flags, 0);                                                     \
    }
#define OPENAT_2(name)                                                                                                 \
    int name(int at, const char *path, int flags) {                                                                    \
        if (opens_for_writing(flags) && meets_path("open", at, path, 0))                                               \
            return -1;                                                                                                 \
        return (int)syscall(SYS_openat, at, path, flags, 0);                                                           \
    }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64) CREAT(creat) CREAT(creat64) FOPEN(fopen) FOPEN(fopen64)
OPEN_2(__open_2) OPEN_2(__open64_2) OPENAT_2(__openat_2) OPENAT_2(__openat64_2)

ssize_t write(int handle, const void *data, size_t size) {
    int fate = meets_handle("write", handle, 1, 1);
    if (fate == 1)
        return -1;
    ssize_t written = syscall(SYS_write, handle, data, fate == 2 ? size / 2 : size);
    return fate == 2 ? half(written) : written;
}

#define PWRITE(name, offset_type)                                                                                      \
    ssize_t name(int handle, const void *data, size_t size, offset_type offset) {                                      \
        int fate = meets_handle("write", handle, 1, 1);                                                                \
        if (fate == 1)                                                                                                 \
            return -1;                                                                                                 \
        ssize_t written = syscall(SYS_pwrite64, handle, data, fate == 2 ? size / 2 : size, offset);                    \
        return fate == 2 ? half(written) : written;                                                                    \
    }
PWRITE(pwrite, off_t) PWRITE(pwrite64, off64_t)

/* of several buffers the first half of the list is written */
ssize_t writev(int handle, const struct iovec *parts, int count) {
    int fate = meets_handle("write", handle, 1, 1);
    if (fate == 1)
        return -1;
    ssize_t written = syscall(SYS_writev, handle, parts, fate == 2 ? count / 2 : count);
    return fate == 2 ? half(written) : written;
}

#define PWRITEV(name, offset_type)                                                                                     \
    ssize_t name(int handle, const struct iovec *parts, int count, offset_type offset) {                               \
        int fate = meets_handle("write", handle, 1, 1);                                                                \
        if (fate == 1)                                                                                                 \
            return -1;                                                                                                 \
        ssize_t written = NEXT(name)(handle, parts, fate == 2 ? count / 2 : count, offset);                            \
        return fate == 2 ? half(written) : written;                                                                    \
    }
PWRITEV(pwritev, off_t) PWRITEV(pwritev64, off64_t)

#define PWRITEV2(name, offset_type)                                                                                    \
    ssize_t name(int handle, const struct iovec *parts, int count, offset_type offset, int flags) {                    \
        int fate = meets_handle("write", handle, 1, 1);                                                                \
        if (fate == 1)                                                                                                 \
            return -1;                                                                                                 \
        ssize_t written = NEXT(name)(handle, parts, fate == 2 ? count / 2 : count, offset, flags);                     \
        return fate == 2 ? half(written) : written;                                                                    \
    }
PWRITEV2(pwritev2, off_t) PWRITEV2(pwritev64v2, off64_t)

#define SENDFILE(name, offset_type)                                                                                    \
    ssize_t name(int out, int in, offset_type *offset, size_t size) {                                                  \
        int fate = meets_handle("write", out, 1, 1);                                                                   \
        if (fate == 1)                                                                                                 \
            return -1;                                                                                                 \
        off64_t place = offset ? *offset : 0, end = syscall(SYS_lseek, in, 0, SEEK_END);                               \
        if (!offset)                                                                                                   \
            return -1;                                                                                                 \
        if (fate == 2 && (off64_t)size > end - place)                                                                  \
            size = end - place;                                                                                        \
        ssize_t written = syscall(SYS_sendfile, out, in, &place, fate == 2 ? size / 2 : size);                         \
        *offset = place;                                                                                               \
        return fate == 2 ? half(written) : written;                                                                    \
    }
SENDFILE(sendfile, off_t) SENDFILE(sendfile64, off64_t)

ssize_t copy_file_range(int in, off64_t *in_at, int out, off64_t *out_at, size_t size, unsigned flags) {
    int fate = meets_handle("write", out, 1, 1);
    if (fate == 1)
        return -1;
    ssize_t written = syscall(SYS_copy_file_range, in, in_at, out, out_at, fate == 2 ? size / 2 : size, flags);
    return fate == 2 ? half(written) : written;
}

/* its size is logged in the place of a new path: so much is on the disk afterwards */
static int meets_sync(int handle) {
    char path[PATH_MAX], size[32];
    struct stat found = {0};
    fstat(handle, &found);
    snprintf(size, sizeof size, "%lld", (long long)found.st_size);
    return folder_length && path_of(handle, path) ? meets("fsync", path, size, 0, 0) : 0;
}

#define ON_HANDLE(name)                                                                                                \
    int name(int handle) { return meets_sync(handle) ? -1 : (int)syscall(SYS_##name, handle); }
ON_HANDLE(fsync) ON_HANDLE(fdatasync)

int close(int handle) {
    int flags = folder_length ? (int)syscall(SYS_fcntl, handle, F_GETFL) : O_RDONLY;
    int failed = flags != -1 && (flags & O_ACCMODE) != O_RDONLY && meets_handle("close", handle, 0, 0);
    int error = errno, closed = (int)syscall(SYS_close, handle);
    if (!failed)
        return closed;
    errno = error;
    return -1;
}

#define FTRUNCATE(name, offset_type)                                                                                   \
    int name(int handle, offset_type size) {                                                                           \
        return meets_handle("truncate", handle, 0, 0) ? -1 : (int)syscall(SYS_ftruncate, handle, size);                \
    }
FTRUNCATE(ftruncate, off_t) FTRUNCATE(ftruncate64, off64_t)

#define TRUNCATE(name, offset_type)                                                                                    \
    int name(const char *path, offset_type size) {                                                                     \
        return meets_path("truncate", AT_FDCWD, path, 0) ? -1 : (int)syscall(SYS_truncate, path, size);                \
    }
TRUNCATE(truncate, off_t) TRUNCATE(truncate64, off64_t)

#define ALLOCATE(name, offset_type)                                                                                    \
    int name(int handle, offset_type offset, offset_type size) {                                                       \
        return meets_handle("allocate", handle, 1, 0) ? errno : NEXT(name)(handle, offset, size);                      \
    }
ALLOCATE(posix_fallocate, off_t) ALLOCATE(posix_fallocate64, off64_t)

int rename(const char *from, const char *to) {
    return meets_paths("rename", AT_FDCWD, from, AT_FDCWD, to) ? -1 : NEXT(rename)(from, to);
}
int renameat(int from_at, const char *from, int to_at, const char *to) {
    return meets_paths("rename", from_at, from, to_at, to) ? -1 : NEXT(renameat)(from_at, from, to_at, to);
}
int renameat2(int from_at, const char *from, int to_at, const char *to, unsigned flags) {
    return meets_paths("rename", from_at, from, to_at, to) ? -1 : NEXT(renameat2)(from_at, from, to_at, to, flags);
}
int link(const char *from, const char *to) {
    return meets_paths("link", AT_FDCWD, from, AT_FDCWD, to) ? -1 : NEXT(link)(from, to);
}
int linkat(int from_at, const char *from, int to_at, const char *to, int flags) {
    return meets_paths("link", from_at, from, to_at, to) ? -1 : NEXT(linkat)(from_at, from, to_at, to, flags);
}
int symlink(const char *from, const char *to) {
    return meets_path("symlink", AT_FDCWD, to, 1) ? -1 : NEXT(symlink)(from, to);
}
int symlinkat(const char *from, int at, const char *to) {
    return meets_path("symlink", at, to, 1) ? -1 : NEXT(symlinkat)(from, at, to);
}
int unlink(const char *path) { return meets_path("unlink", AT_FDCWD, path, 0) ? -1 : NEXT(unlink)(path); }
int unlinkat(int at, const char *path, int flags) {
    return meets_path("unlink", at, path, 0) ? -1 : NEXT(unlinkat)(at, path, flags);
}
int rmdir(const char *path) { return meets_path("unlink", AT_FDCWD, path, 0) ? -1 : NEXT(rmdir)(path); }
int mkdir(const char *path, mode_t mode) { return meets_path("mkdir", AT_FDCWD, path, 1) ? -1 : NEXT(mkdir)(path, mode); }
int mkdirat(int at, const char *path, mode_t mode) {
    return meets_path("mkdir", at, path, 1) ? -1 : NEXT(mkdirat)(at, path, mode);
}
