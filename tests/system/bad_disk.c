// Preloaded: a file whose path contains what BAD_DISK says cannot be synced, as on a disk that fails under the writes.
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

int fsync(int file) {
    char link[64], path[4096];
    const char *bad = getenv("BAD_DISK");
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (bad && length > 0) {
        path[length] = 0;
        if (strstr(path, bad)) {
            errno = EIO;
            return -1;
        }
    }
    return syscall(SYS_fsync, file);
}
