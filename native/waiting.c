// Owns which flow has its turn next: a binary heap by time of those that wait for one, each in it
// once at most.

#include "flows.h"

static void place(struct lt_intake *in, uint32_t at, struct lt_due due) {
  in->heap[at] = due;
  in->flows[due.flow].heap_at = at;
}

static void sift_up(struct lt_intake *in, uint32_t at, struct lt_due due) {
  for (; at > 0 && in->heap[(at - 1) / 2].at_ms > due.at_ms; at = (at - 1) / 2) {
    place(in, at, in->heap[(at - 1) / 2]);
  }
  place(in, at, due);
}

static void sift_down(struct lt_intake *in, uint32_t at, struct lt_due due) {
  for (;;) {
    uint32_t child = 2 * at + 1;
    if (child >= in->waiting) break;
    if (child + 1 < in->waiting && in->heap[child + 1].at_ms < in->heap[child].at_ms) child++;
    if (in->heap[child].at_ms >= due.at_ms) break;
    place(in, at, in->heap[child]);
    at = child;
  }
  place(in, at, due);
}

void lt_await(struct lt_intake *in, uint32_t id, double at_ms) {
  uint32_t at = in->flows[id].heap_at;
  struct lt_due due = {at_ms, id};
  if (at_ms == LT_NEVER) {
    if (at == LT_NONE) return;
    in->flows[id].heap_at = LT_NONE;
    struct lt_due last = in->heap[--in->waiting];
    if (at == in->waiting) return;
    due = last;
  } else if (at == LT_NONE) at = in->waiting++;
  else if (in->heap[at].at_ms == at_ms) return;
  if (at > 0 && in->heap[(at - 1) / 2].at_ms > due.at_ms) sift_up(in, at, due);
  else sift_down(in, at, due);
}
