// Owns the clients and peers of `lattice bench ingress`: one process measures round trips of one
// kind, spinning or sleeping, or answers them. world.ts compiles it and pins each process to a core.
//
//   serve KIND PORT                    KIND: udp-spin udp-sleep tcp-spin tcp-sleep
//   ask KIND ADDRESS PORT COUNT RATE   the same, against a peer that echoes 96 bytes
//   hello KIND ADDRESS PORT COUNT RATE TENANT KEY PROMPT_BYTES CLIENT_MAC SERVER_MAC
//                                      KIND: xdp-spin udp-spin udp-sleep
//   flood xdp ADDRESS PORT MS 0 TENANT KEY PROMPT_BYTES CLIENT_MAC SERVER_MAC
//   http KIND ADDRESS PORT COUNT RATE BYTES
//   hog cpu - 0 MS 0                   keeps its core busy and sends nothing
//
// RATE is requests a second, 0 is one after the other. Prints one line of JSON.

#include "wire.h"

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_link.h>
#include <linux/if_xdp.h>
#include <net/if.h>
#include <netinet/ip.h>
#include <netinet/tcp.h>
#include <netinet/udp.h>
#include <signal.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#define FRAME_BYTES 2048
#define FRAMES 1024
#define BURST 64
#define OUR_PORT 40000
#define OFFSET (ETH_HLEN + 20 + 8)

struct asker {
  uint32_t tenant;
  uint8_t key[16];
  uint32_t prompt_bytes;
  uint64_t next;
};

static void write_hello(uint8_t *h, struct asker *a) {
  memset(h, 0, HELLO_BYTES);
  put(h, 0x4c54, 2);
  h[2] = 1;
  h[3] = 1;
  put(h + 8, a->tenant, 4);
  put(h + 16, a->next++, 8);
  put(h + 24, now_ns(CLOCK_REALTIME) / 1000, 8);
  put(h + 40, a->prompt_bytes, 4);
  put(h + 44, 100, 4);
  put(h + 54, (a->prompt_bytes + 1199) / 1200, 2);
  // Four prefix hashes: which ones does not change the work.
  for (int i = 0; i < 4; i++) put(h + 56 + 8 * i, i + 1, 8);
  put(h + 88, sip(a->key, h, 88), 8);
}

static struct asker asker_of(char **arg) {
  struct asker a = {.tenant = atoi(arg[0]), .prompt_bytes = strtoul(arg[2], 0, 10)};
  for (int i = 0; i < 16; i++) sscanf(arg[1] + 2 * i, "%2hhx", &a.key[i]);
  a.next = now_ns(CLOCK_MONOTONIC) << 8;
  return a;
}

// --- AF_XDP --------------------------------------------------------------------------------------

struct ring {
  uint32_t *producer, *consumer, *flags;
  void *entries;
};

struct xdp {
  int fd;
  uint8_t *frames;
  struct ring rx, tx, fill, done;
};

static int bpf(int command, union bpf_attr *attr) {
  return syscall(SYS_bpf, command, attr, sizeof *attr);
}

/** Hands what arrives on queue 0 for our port to the socket; the rest goes on. */
static void redirect_to(int fd, int ifindex) {
  union bpf_attr a = {.map_type = BPF_MAP_TYPE_XSKMAP, .key_size = 4, .value_size = 4};
  a.max_entries = 1;
  int map = bpf(BPF_MAP_CREATE, &a);
  if (map < 0) die("XSKMAP");
  uint32_t zero = 0;
  a = (union bpf_attr){.map_fd = map, .key = (uint64_t)&zero, .value = (uint64_t)&fd};
  if (bpf(BPF_MAP_UPDATE_ELEM, &a)) die("map");
  struct bpf_insn code[] = {
      // r2 = data, r3 = data_end; 38 bytes reach behind the UDP port.
      {BPF_LDX | BPF_W | BPF_MEM, 2, 1, offsetof(struct xdp_md, data), 0},
      {BPF_LDX | BPF_W | BPF_MEM, 3, 1, offsetof(struct xdp_md, data_end), 0},
      {BPF_ALU64 | BPF_MOV | BPF_X, 4, 2, 0, 0},
      {BPF_ALU64 | BPF_ADD | BPF_K, 4, 0, 0, 38},
      {BPF_JMP | BPF_JGT | BPF_X, 4, 3, 8, 0},
      {BPF_LDX | BPF_H | BPF_MEM, 5, 2, 36, 0},
      {BPF_JMP | BPF_JNE | BPF_K, 5, 0, 6, htons(OUR_PORT)},
      // return bpf_redirect_map(map, 0, XDP_PASS)
      {BPF_LD | BPF_DW | BPF_IMM, 1, BPF_PSEUDO_MAP_FD, 0, map},
      {0, 0, 0, 0, 0},
      {BPF_ALU64 | BPF_MOV | BPF_K, 2, 0, 0, 0},
      {BPF_ALU64 | BPF_MOV | BPF_K, 3, 0, 0, XDP_PASS},
      {BPF_JMP | BPF_CALL, 0, 0, 0, BPF_FUNC_redirect_map},
      {BPF_JMP | BPF_EXIT, 0, 0, 0, 0},
      {BPF_ALU64 | BPF_MOV | BPF_K, 0, 0, 0, XDP_PASS},
      {BPF_JMP | BPF_EXIT, 0, 0, 0, 0},
  };
  a = (union bpf_attr){.prog_type = BPF_PROG_TYPE_XDP, .insns = (uint64_t)code};
  a.insn_cnt = sizeof code / sizeof *code;
  a.license = (uint64_t)"GPL";
  int program = bpf(BPF_PROG_LOAD, &a);
  if (program < 0) die("program");
  a = (union bpf_attr){.link_create = {.prog_fd = program, .target_ifindex = ifindex}};
  a.link_create.attach_type = BPF_XDP;
  a.link_create.flags = XDP_FLAGS_DRV_MODE;
  if (bpf(BPF_LINK_CREATE, &a) < 0) die("link");
}

static struct ring map_ring(int fd, struct xdp_ring_offset o, uint64_t page, size_t entry) {
  uint8_t *at = mmap(0, o.desc + FRAMES * entry, PROT_READ | PROT_WRITE,
                     MAP_SHARED | MAP_POPULATE, fd, page);
  if (at == MAP_FAILED) die("ring");
  return (struct ring){(void *)(at + o.producer), (void *)(at + o.consumer),
                       (void *)(at + o.flags), at + o.desc};
}

static struct xdp open_xdp(const char *name) {
  struct xdp x = {.fd = socket(AF_XDP, SOCK_RAW, 0)};
  if (x.fd < 0) die("AF_XDP");
  // The first half is for sending.
  size_t bytes = 2 * FRAMES * FRAME_BYTES;
  x.frames = mmap(0, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE,
                  -1, 0);
  struct xdp_umem_reg r = {.addr = (uint64_t)x.frames, .len = bytes, .chunk_size = FRAME_BYTES};
  if (setsockopt(x.fd, SOL_XDP, XDP_UMEM_REG, &r, sizeof r)) die("UMEM");
  int size = FRAMES, options[] = {XDP_UMEM_FILL_RING, XDP_UMEM_COMPLETION_RING, XDP_RX_RING,
                                  XDP_TX_RING};
  for (int i = 0; i < 4; i++) {
    if (setsockopt(x.fd, SOL_XDP, options[i], &size, sizeof size)) die("ring size");
  }
  struct xdp_mmap_offsets o;
  socklen_t length = sizeof o;
  if (getsockopt(x.fd, SOL_XDP, XDP_MMAP_OFFSETS, &o, &length)) die("offsets");
  x.rx = map_ring(x.fd, o.rx, XDP_PGOFF_RX_RING, sizeof(struct xdp_desc));
  x.tx = map_ring(x.fd, o.tx, XDP_PGOFF_TX_RING, sizeof(struct xdp_desc));
  x.fill = map_ring(x.fd, o.fr, XDP_UMEM_PGOFF_FILL_RING, 8);
  x.done = map_ring(x.fd, o.cr, XDP_UMEM_PGOFF_COMPLETION_RING, 8);
  for (int i = 0; i < FRAMES; i++) {
    ((uint64_t *)x.fill.entries)[i] = (uint64_t)(FRAMES + i) * FRAME_BYTES;
  }
  __atomic_store_n(x.fill.producer, FRAMES, __ATOMIC_RELEASE);
  int ifindex = if_nametoindex(name);
  struct sockaddr_xdp to = {.sxdp_family = AF_XDP, .sxdp_ifindex = ifindex};
  to.sxdp_flags = XDP_COPY | XDP_USE_NEED_WAKEUP;
  if (bind(x.fd, (void *)&to, sizeof to)) die("bind");
  redirect_to(x.fd, ifindex);
  return x;
}

static void xdp_queue(struct xdp *x, uint32_t frame, uint32_t bytes) {
  uint32_t at = *x->tx.producer;
  struct xdp_desc *d = (struct xdp_desc *)x->tx.entries + (at & (FRAMES - 1));
  *d = (struct xdp_desc){.addr = (uint64_t)frame * FRAME_BYTES, .len = bytes};
  __atomic_store_n(x->tx.producer, at + 1, __ATOMIC_RELEASE);
}

static void xdp_send(struct xdp *x) {
  if (sendto(x->fd, 0, 0, MSG_DONTWAIT, 0, 0) < 0 && errno != EAGAIN && errno != EBUSY &&
      errno != ENOBUFS) {
    die("sendto");
  }
  __atomic_store_n(x->done.consumer, __atomic_load_n(x->done.producer, __ATOMIC_ACQUIRE),
                   __ATOMIC_RELEASE);
}

/** The next frame that arrived, or null; it is given back to the kernel by the next call. */
static uint8_t *xdp_take(struct xdp *x) {
  uint32_t at = *x->rx.consumer;
  if (__atomic_load_n(x->rx.producer, __ATOMIC_ACQUIRE) == at) return 0;
  struct xdp_desc *d = (struct xdp_desc *)x->rx.entries + (at & (FRAMES - 1));
  uint64_t address = d->addr;
  __atomic_store_n(x->rx.consumer, at + 1, __ATOMIC_RELEASE);
  uint32_t free = *x->fill.producer;
  ((uint64_t *)x->fill.entries)[free & (FRAMES - 1)] = address & ~(uint64_t)(FRAME_BYTES - 1);
  __atomic_store_n(x->fill.producer, free + 1, __ATOMIC_RELEASE);
  return x->frames + address;
}

/** Everything of a frame before its datagram. */
static void write_head(uint8_t *frame, const char *to, int port, char **macs) {
  memset(frame, 0, OFFSET);
  for (int i = 0; i < 6; i++) {
    sscanf(macs[1] + 3 * i, "%2hhx", &frame[i]);
    sscanf(macs[0] + 3 * i, "%2hhx", &frame[6 + i]);
  }
  put(frame + 12, ETH_P_IP, 2);
  struct iphdr *ip = (void *)(frame + ETH_HLEN);
  ip->version = 4;
  ip->ihl = 5;
  ip->ttl = 64;
  ip->protocol = IPPROTO_UDP;
  ip->tot_len = htons(20 + 8 + HELLO_BYTES);
  ip->daddr = inet_addr(to);
  // The client of the pair: one below.
  ip->saddr = htonl(ntohl(ip->daddr) - 1);
  struct udphdr *udp = (void *)(ip + 1);
  udp->source = htons(OUR_PORT);
  udp->dest = htons(port);
  udp->len = htons(8 + HELLO_BYTES);
}

// --- Clients -------------------------------------------------------------------------------------

static int connected(const char *kind, const char *address, int port) {
  int stream = strncmp(kind, "tcp", 3) == 0, one = 1;
  int fd = socket(AF_INET, stream ? SOCK_STREAM : SOCK_DGRAM, 0);
  struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
  to.sin_addr.s_addr = inet_addr(address);
  if (connect(fd, (void *)&to, sizeof to)) die("connect");
  if (stream) setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  return fd;
}

/** Reads at least so many bytes; -1 at the end of the stream. */
static int receive(int fd, uint8_t *to, int least, int size, int spins) {
  int got = 0;
  while (got < least) {
    ssize_t n = recv(fd, to + got, size - got, spins ? MSG_DONTWAIT : 0);
    if (n > 0) got += n;
    else if (n == 0 || (errno != EAGAIN && errno != EINTR)) return -1;
  }
  return got;
}

static int spins_of(const char *kind) {
  return strstr(kind, "spin") != 0;
}

static void ask(const char *kind, const char *address, int port, long count, double rate,
                struct asker *hello) {
  int fd = connected(kind, address, port), spins = spins_of(kind);
  uint8_t question[HELLO_BYTES] = {0}, answer[4096];
  long types[16] = {0}, warm = rate > 0 ? 0 : count / 10;
  uint64_t start = now_ns(CLOCK_MONOTONIC), cpu = 0, begin = start;
  for (long i = 0; i < count + warm; i++) {
    if (i == warm) begin = now_ns(CLOCK_MONOTONIC), cpu = now_ns(CLOCK_PROCESS_CPUTIME_ID);
    wait_turn(start, i, rate, spins);
    if (hello) write_hello(question, hello);
    uint64_t from = now_ns(CLOCK_MONOTONIC);
    if (send(fd, question, sizeof question, 0) < 0) die("send");
    if (receive(fd, answer, HELLO_BYTES, sizeof answer, spins) < 0) die("recv");
    if (i < warm) continue;
    samples[taken++] = now_ns(CLOCK_MONOTONIC) - from;
    types[answer[3] & 15]++;
  }
  cpu = now_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu;
  report(now_ns(CLOCK_MONOTONIC) - begin, cpu, count, types);
}

static void ask_xdp(const char *address, int port, long count, double rate, struct asker *hello,
                    char **macs) {
  struct xdp x = open_xdp("veth-c");
  long types[16] = {0}, warm = rate > 0 ? 0 : count / 10;
  uint64_t start = now_ns(CLOCK_MONOTONIC), cpu = 0, begin = start;
  for (long i = 0; i < count + warm; i++) {
    if (i == warm) begin = now_ns(CLOCK_MONOTONIC), cpu = now_ns(CLOCK_PROCESS_CPUTIME_ID);
    wait_turn(start, i, rate, 1);
    uint8_t *frame = x.frames + (i & (FRAMES - 1)) * FRAME_BYTES, *answer;
    write_head(frame, address, port, macs);
    write_hello(frame + OFFSET, hello);
    uint64_t from = now_ns(CLOCK_MONOTONIC);
    xdp_queue(&x, i & (FRAMES - 1), OFFSET + HELLO_BYTES);
    xdp_send(&x);
    // Other frames (neighbour discovery) may come between.
    while (!(answer = xdp_take(&x)) || memcmp(answer + OFFSET + 16, frame + OFFSET + 16, 8)) {
      if (now_ns(CLOCK_MONOTONIC) - from > 1000000000) {
        fprintf(stderr, "no answer to HELLO %ld\n", i);
        exit(1);
      }
    }
    if (i < warm) continue;
    samples[taken++] = now_ns(CLOCK_MONOTONIC) - from;
    types[answer[OFFSET + 3] & 15]++;
  }
  cpu = now_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu;
  report(now_ns(CLOCK_MONOTONIC) - begin, cpu, count, types);
}

/** As many HELLOs as the link takes, for so long; they are written once. */
static void flood(const char *address, int port, long ms, struct asker *hello, char **macs) {
  struct xdp x = open_xdp("veth-c");
  for (int i = 0; i < FRAMES; i++) {
    uint8_t *frame = x.frames + i * FRAME_BYTES;
    write_head(frame, address, port, macs);
    write_hello(frame + OFFSET, hello);
  }
  long sent = 0, types[16] = {0};
  uint64_t start = now_ns(CLOCK_MONOTONIC), end = start + ms * 1000000ull;
  uint64_t cpu = now_ns(CLOCK_PROCESS_CPUTIME_ID);
  while (now_ns(CLOCK_MONOTONIC) < end) {
    for (int i = 0; i < BURST; i++) xdp_queue(&x, sent++ & (FRAMES - 1), OFFSET + HELLO_BYTES);
    while (__atomic_load_n(x.tx.consumer, __ATOMIC_ACQUIRE) != *x.tx.producer) xdp_send(&x);
    for (uint8_t *answer; (answer = xdp_take(&x));) types[answer[OFFSET + 3] & 15]++;
  }
  cpu = now_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu;
  report(now_ns(CLOCK_MONOTONIC) - start, cpu, sent, types);
}

/** What a flood's sender takes from its neighbours without sending anything. */
static void hog(long ms) {
  uint64_t start = now_ns(CLOCK_MONOTONIC), end = start + ms * 1000000ull;
  long types[16] = {0};
  while (now_ns(CLOCK_MONOTONIC) < end);
  report(now_ns(CLOCK_MONOTONIC) - start, 0, 1, types);
}

static void http(const char *kind, const char *address, int port, long count, double rate,
                 long bytes) {
  int fd = connected(kind, address, port), spins = spins_of(kind);
  char *request = malloc(bytes + 512);
  const char *body = "{\"model\":\"bench\",\"max_tokens\":100,\"prompt\":\"";
  long length = bytes + strlen(body) + 2;
  int head = sprintf(request,
                     "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json"
                     "\r\nContent-Length: %ld\r\n\r\n%s",
                     length, body);
  memset(request + head, 'a', bytes);
  memcpy(request + head + bytes, "\"}", 2);
  long all = head + bytes + 2, types[16] = {0}, warm = rate > 0 ? 0 : count / 10;
  uint64_t start = now_ns(CLOCK_MONOTONIC), cpu = 0, begin = start;
  for (long i = 0; i < count + warm; i++) {
    if (i == warm) begin = now_ns(CLOCK_MONOTONIC), cpu = now_ns(CLOCK_PROCESS_CPUTIME_ID);
    wait_turn(start, i, rate, spins);
    uint64_t from = now_ns(CLOCK_MONOTONIC);
    for (long sent = 0; sent < all;) {
      ssize_t n = send(fd, request + sent, all - sent, 0);
      if (n < 0) die("send");
      sent += n;
    }
    char answer[8192];
    int got = 0;
    for (char *end = 0; !end;) {
      int n = receive(fd, (uint8_t *)answer + got, 1, sizeof answer - 1 - got, spins);
      if (n < 0) die("recv");
      got += n;
      answer[got] = 0;
      char *blank = strstr(answer, "\r\n\r\n"), *said = strcasestr(answer, "content-length:");
      if (blank && said && got >= blank + 4 - answer + atoi(said + 15)) end = blank;
    }
    if (i < warm) continue;
    samples[taken++] = now_ns(CLOCK_MONOTONIC) - from;
    types[strncmp(answer + 9, "429", 3) == 0 ? 3 : 2]++;
  }
  cpu = now_ns(CLOCK_PROCESS_CPUTIME_ID) - cpu;
  report(now_ns(CLOCK_MONOTONIC) - begin, cpu, count, types);
}

// --- Peers ---------------------------------------------------------------------------------------

/** Says how much CPU time it took. */
static void on_term(int signal) {
  (void)signal;
  printf("{\"cpu_ns\":%llu}\n", (unsigned long long)now_ns(CLOCK_PROCESS_CPUTIME_ID));
  fflush(stdout);
  _exit(0);
}

static void serve(const char *kind, int port) {
  int stream = strncmp(kind, "tcp", 3) == 0, spins = spins_of(kind), one = 1;
  int fd = socket(AF_INET, stream ? SOCK_STREAM : SOCK_DGRAM, 0);
  struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(port)}, from;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
  if (bind(fd, (void *)&at, sizeof at)) die("bind");
  if (stream && listen(fd, 8)) die("listen");
  signal(SIGTERM, on_term);
  puts("ready");
  fflush(stdout);
  uint8_t question[4096];
  for (;;) {
    if (!stream) {
      socklen_t length = sizeof from;
      ssize_t n = recvfrom(fd, question, sizeof question, spins ? MSG_DONTWAIT : 0, (void *)&from,
                           &length);
      if (n > 0) sendto(fd, question, n, 0, (void *)&from, length);
      continue;
    }
    int client = accept(fd, 0, 0);
    if (client < 0) die("accept");
    setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    while (receive(client, question, HELLO_BYTES, HELLO_BYTES, spins) > 0) {
      if (send(client, question, HELLO_BYTES, 0) < 0) break;
    }
    close(client);
  }
}

int main(int count, char **arg) {
  if (count >= 4 && !strcmp(arg[1], "serve")) serve(arg[2], atoi(arg[3]));
  if (count < 7) return 2;
  const char *what = arg[1], *kind = arg[2], *address = arg[3];
  int port = atoi(arg[4]);
  long requests = atol(arg[5]);
  double rate = atof(arg[6]);
  samples = malloc((requests + 1) * sizeof *samples);
  if (!strcmp(what, "ask")) ask(kind, address, port, requests, rate, 0);
  else if (!strcmp(what, "hog")) hog(requests);
  else if (!strcmp(what, "http")) http(kind, address, port, requests, rate, atol(arg[7]));
  else {
    struct asker a = asker_of(arg + 7);
    if (!strcmp(what, "flood")) flood(address, port, requests, &a, arg + 10);
    else if (!strncmp(kind, "xdp", 3)) ask_xdp(address, port, requests, rate, &a, arg + 10);
    else ask(kind, address, port, requests, rate, &a);
  }
  return 0;
}
