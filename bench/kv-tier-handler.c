// Owns a fault handler in C, to compare the pager with: a thread that answers a touch of an absent
// page by reading its column from disk and writing its pages. It decrypts nothing and has no queue.

#define _GNU_SOURCE
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

static struct {
  int fault_fd, memory_fd, file_fd;
  uint64_t base, slot_bytes, range_bytes, page_bytes, ranges;
} g;
static volatile int stop;
static pthread_t thread;

static void *handle(void *unused) {
  const uint64_t column_bytes = g.ranges * g.page_bytes;
  char *buffer = aligned_alloc(4096, column_bytes);
  struct pollfd wait = {g.fault_fd, POLLIN, 0};
  while (!stop) {
    struct uffd_msg message;
    if (poll(&wait, 1, 50) <= 0 || read(g.fault_fd, &message, sizeof message) <= 0) continue;
    const uint64_t address = message.arg.pagefault.address & ~(g.page_bytes - 1);
    const uint64_t offset = address - g.base;
    const uint64_t region = offset / g.slot_bytes;
    const uint64_t column = offset % g.slot_bytes % g.range_bytes / g.page_bytes;
    if (pread(g.file_fd, buffer, column_bytes, column * column_bytes) < 0) abort();
    for (uint64_t range = 0; range < g.ranges; range++) {
      const uint64_t at = region * g.slot_bytes + range * g.range_bytes + column * g.page_bytes;
      if (pwrite(g.memory_fd, buffer + range * g.page_bytes, g.page_bytes, at) < 0) abort();
    }
    struct uffdio_range woken = {address, g.page_bytes};
    ioctl(g.fault_fd, UFFDIO_WAKE, &woken);
  }
  free(buffer);
  return unused;
}

int handler_start(int fault_fd, int memory_fd, int file_fd, uint64_t base, uint64_t slot_bytes,
                  uint64_t range_bytes, uint64_t page_bytes, uint64_t ranges) {
  g.fault_fd = fault_fd, g.memory_fd = memory_fd, g.file_fd = file_fd, g.base = base;
  g.slot_bytes = slot_bytes, g.range_bytes = range_bytes;
  g.page_bytes = page_bytes, g.ranges = ranges;
  return pthread_create(&thread, 0, handle, 0);
}

void handler_stop(void) {
  stop = 1;
  pthread_join(thread, 0);
}
