// SPDX-License-Identifier: Apache-2.0
// Preloaded into a command: counts its calls that change files below one folder, and at one of them lets the call fail
// or sends a signal. It reads what to do from a page of memory that shim.py maps too (the file $HOSTILE_PAGE), so all
// processes of a command count together, and a process that has imported everything can be forked for each try.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum call { WRITE, SYNC, RENAME, LINK, MKDIR, UNLINK, ALLOCATE, TRUNCATE, OPEN, CALLS };
enum action { COUNT, FAIL, SIGNAL_ALL, SIGNAL_PARENT, SIGNAL_CALLER };

struct page {  // shim.py knows this order
  int32_t armed, action, value, sticky, after, main, hits, matching;
  int64_t at;        // the matching call that is hit, from 1
  int64_t of_calls;  // which calls match: a bit each
  int64_t count[CALLS];
  char folder[1024], where[1024];
};

static struct page *page;

__attribute__((constructor)) static void map_page(void) {
  const char *path = getenv("HOSTILE_PAGE");
  int file = path ? (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC, 0) : -1;
  if (file < 0) return;
  void *mapped = mmap(NULL, sizeof(struct page), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (mapped != MAP_FAILED) page = mapped;
  close(file);
}

static int below(const char *path) {
  size_t length = strlen(page->folder);
  return length && !strncmp(path, page->folder, length) && (path[length] == '/' || !path[length]);
}

static int of_descriptor(int file, char *path) {  // path has PATH_MAX bytes; returns whether the file has a name
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, PATH_MAX - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return 1;
}

static int of_name(int folder, const char *name, char *path) {
  if (!name) return 0;
  if (name[0] == '/') return snprintf(path, PATH_MAX, "%s", name) > 0;
  if (folder == AT_FDCWD ? !getcwd(path, PATH_MAX) : !of_descriptor(folder, path)) return 0;
  size_t length = strlen(path);
  snprintf(path + length, PATH_MAX - length, "/%s", name);
  return 1;
}

static void send_signal(void) {
  int number = page->value, caller = getpid(), all = page->action == SIGNAL_ALL;
  if (page->action == SIGNAL_PARENT) kill(page->main, number);
  if (page->action == SIGNAL_CALLER) kill(caller, number);
  if (all && number != SIGKILL && number != SIGSTOP) kill(-page->main, number);  // as a terminal does
  if (all && (number == SIGKILL || number == SIGSTOP)) {
    if (getpgrp() != page->main) kill(-page->main, number);
    kill(0, number);
  }
}

// What to do about a call: nothing, let it fail (returns 1), or a signal before (now) or after it (*later).
static int meets(enum call call, const char *path, int *later) {
  *later = 0;
  if (!below(path)) return 0;
  __sync_add_and_fetch(&page->count[call], 1);
  if (!(page->of_calls & (1L << call))) return 0;
  int64_t number = __sync_add_and_fetch(&page->matching, 1);
  if (number != page->at && !(page->sticky && number > page->at && page->at)) return 0;
  if (page->action == COUNT) return 0;
  if (__sync_add_and_fetch(&page->hits, 1) == 1) snprintf(page->where, sizeof page->where, "%s", path);
  if (page->action == FAIL) {
    errno = page->value;
    return 1;
  }
  *later = page->after;
  if (!page->after) send_signal();
  return 0;
}

static int meets_file(enum call call, int file, int *later) {
  char path[PATH_MAX];
  *later = 0;
  return page && page->armed && of_descriptor(file, path) && meets(call, path, later);
}

static int meets_name(enum call call, int folder, const char *name, int *later) {
  char path[PATH_MAX];
  *later = 0;
  return page && page->armed && of_name(folder, name, path) && meets(call, path, later);
}

// A function of the C library, as itself, around one of the calls above that names a file by descriptor or by path.
#define AROUND(type, name, parameters, arguments, failed, met) \
  type name parameters { \
    static type(*real) parameters; \
    if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name); \
    int later; \
    if (met) return failed; \
    type result = real arguments; \
    int kept = errno; \
    if (later) send_signal(); \
    errno = kept; \
    return result; \
  }
#define OF_FILE(type, name, call, file, parameters, arguments) \
  AROUND(type, name, parameters, arguments, -1, meets_file(call, file, &later))
#define OF_NAME(name, call, folder, path, parameters, arguments) \
  AROUND(int, name, parameters, arguments, -1, meets_name(call, folder, path, &later))

OF_FILE(ssize_t, write, WRITE, f, (int f, const void *b, size_t n), (f, b, n))
OF_FILE(ssize_t, writev, WRITE, f, (int f, const struct iovec *v, int n), (f, v, n))
OF_FILE(ssize_t, pwrite, WRITE, f, (int f, const void *b, size_t n, off_t o), (f, b, n, o))
OF_FILE(ssize_t, pwrite64, WRITE, f, (int f, const void *b, size_t n, off64_t o), (f, b, n, o))
OF_FILE(ssize_t, sendfile, WRITE, f, (int f, int g, off_t *o, size_t n), (f, g, o, n))
OF_FILE(ssize_t, sendfile64, WRITE, f, (int f, int g, off64_t *o, size_t n), (f, g, o, n))
OF_FILE(ssize_t, copy_file_range, WRITE, g,
        (int f, off64_t *o, int g, off64_t *p, size_t n, unsigned int flags), (f, o, g, p, n, flags))
AROUND(size_t, fwrite, (const void *b, size_t s, size_t n, FILE *f), (b, s, n, f), 0,
       meets_file(WRITE, fileno(f), &later))

OF_FILE(int, fsync, SYNC, f, (int f), (f))
OF_FILE(int, fdatasync, SYNC, f, (int f), (f))
OF_FILE(int, fallocate, ALLOCATE, f, (int f, int m, off_t o, off_t n), (f, m, o, n))
OF_FILE(int, fallocate64, ALLOCATE, f, (int f, int m, off64_t o, off64_t n), (f, m, o, n))
AROUND(int, posix_fallocate, (int f, off_t o, off_t n), (f, o, n), errno, meets_file(ALLOCATE, f, &later))
AROUND(int, posix_fallocate64, (int f, off64_t o, off64_t n), (f, o, n), errno, meets_file(ALLOCATE, f, &later))
OF_FILE(int, ftruncate, TRUNCATE, f, (int f, off_t n), (f, n))
OF_FILE(int, ftruncate64, TRUNCATE, f, (int f, off64_t n), (f, n))

OF_NAME(truncate, TRUNCATE, AT_FDCWD, p, (const char *p, off_t n), (p, n))
OF_NAME(truncate64, TRUNCATE, AT_FDCWD, p, (const char *p, off64_t n), (p, n))
OF_NAME(rename, RENAME, AT_FDCWD, b, (const char *a, const char *b), (a, b))
OF_NAME(renameat, RENAME, y, b, (int x, const char *a, int y, const char *b), (x, a, y, b))
OF_NAME(renameat2, RENAME, y, b, (int x, const char *a, int y, const char *b, unsigned int flags), (x, a, y, b, flags))
OF_NAME(link, LINK, AT_FDCWD, b, (const char *a, const char *b), (a, b))
OF_NAME(linkat, LINK, y, b, (int x, const char *a, int y, const char *b, int flags), (x, a, y, b, flags))
OF_NAME(mkdir, MKDIR, AT_FDCWD, p, (const char *p, mode_t m), (p, m))
OF_NAME(mkdirat, MKDIR, x, p, (int x, const char *p, mode_t m), (x, p, m))
OF_NAME(unlink, UNLINK, AT_FDCWD, p, (const char *p), (p))
OF_NAME(unlinkat, UNLINK, x, p, (int x, const char *p, int flags), (x, p, flags))
OF_NAME(rmdir, UNLINK, AT_FDCWD, p, (const char *p), (p))

static int opens(int folder, const char *path, int flags, int *later) {
  *later = 0;
  int writes = (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC));
  return writes && meets_name(OPEN, folder, path, later);
}

static int streams(const char *path, const char *type, int *later) {
  *later = 0;
  return strpbrk(type, "wa+") && meets_name(OPEN, AT_FDCWD, path, later);
}

// the mode is taken as if it were always given, as the system does
#define OPENS(name, folder, parameters, arguments) \
  int name parameters { \
    static int(*real) parameters; \
    if (!real) real = (int(*) parameters)dlsym(RTLD_NEXT, #name); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t m = va_arg(rest, mode_t); \
    va_end(rest); \
    int later; \
    if (opens(folder, p, flags, &later)) return -1; \
    int result = real arguments; \
    int kept = errno; \
    if (later) send_signal(); \
    errno = kept; \
    return result; \
  }

OPENS(open, AT_FDCWD, (const char *p, int flags, ...), (p, flags, m))
OPENS(open64, AT_FDCWD, (const char *p, int flags, ...), (p, flags, m))
OPENS(openat, x, (int x, const char *p, int flags, ...), (x, p, flags, m))
OPENS(openat64, x, (int x, const char *p, int flags, ...), (x, p, flags, m))
AROUND(FILE *, fopen, (const char *p, const char *type), (p, type), NULL, streams(p, type, &later))
AROUND(FILE *, fopen64, (const char *p, const char *type), (p, type), NULL, streams(p, type, &later))
