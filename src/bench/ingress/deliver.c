// Owns the client that brings prompts to a server, over datagrams or over HTTP, for measuring what
// that costs the server: no client's runtime competes with it for time.
//
//   deliver KIND ADDRESS PORT COUNT RATE WINDOW PROMPTS TENANT KEY
//
// KIND is datagram or http, RATE requests a second (0: as soon as the window lets), WINDOW how many
// may be on their way: over datagrams until the prompt has arrived, over HTTP until the answer.
// PROMPTS is a file of prompts of 4 KiB each, taken in turn. Says "ready" when it has its sockets,
// begins when a line comes on its standard input, and ends when all have been answered.

#include "wire.h"

#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/stat.h>

#define PROMPT_BYTES 4096
#define FRAGMENT_BYTES 1200
#define FRAGMENTS ((PROMPT_BYTES + FRAGMENT_BYTES - 1) / FRAGMENT_BYTES)
#define REPEAT_NS 100000000ull

enum type { HELLO = 1, GRANT, REJECT, DATA, ACK, TOKENS, END };
enum state { UNSENT, ASKED, GRANTED, DELIVERED, ENDED };

struct request {
  enum state state;
  uint32_t route;
  uint64_t cookie, sent_ns, began_ns;
  int fd;
  char *left;
  long left_bytes;
  char answer[4096];
  int got;
};

static struct request *requests;
static long total, sent, on_way, ended;
static uint8_t *prompts;
static long prompt_count;
static uint8_t key[16];
static uint32_t tenant;
static uint64_t base;

static const uint8_t *prompt_of(long i) {
  return prompts + i % prompt_count * PROMPT_BYTES;
}

static void finish(struct request *r) {
  samples[taken++] = now_ns(CLOCK_MONOTONIC) - r->began_ns;
  r->state = ENDED;
  ended++;
}

// --- Datagrams -----------------------------------------------------------------------------------

static int udp;

static void header(uint8_t *h, enum type type, long i) {
  struct request *r = &requests[i];
  memset(h, 0, HELLO_BYTES);
  put(h, 0x4c54, 2);
  h[2] = 1;
  h[3] = type;
  put(h + 8, tenant, 4);
  put(h + 16, base + i, 8);
  put(h + 24, now_ns(CLOCK_REALTIME) / 1000, 8);
  put(h + 32, r->route, 4);
  put(h + 40, PROMPT_BYTES, 4);
  put(h + 44, 1, 4);
  put(h + 56, r->cookie, 8);
}

static void send_signed(uint8_t *h, size_t bytes) {
  put(h + 88, sip(key, h, 88), 8);
  while (send(udp, h, bytes, 0) < 0) {
    if (errno != EAGAIN && errno != ENOBUFS) die("send");
  }
}

static void send_hello(long i) {
  uint8_t h[HELLO_BYTES];
  header(h, HELLO, i);
  put(h + 54, FRAGMENTS, 2);
  send_signed(h, sizeof h);
  requests[i].sent_ns = now_ns(CLOCK_MONOTONIC);
}

static void send_data(long i) {
  for (int f = 0; f < FRAGMENTS; f++) {
    uint8_t h[HELLO_BYTES + FRAGMENT_BYTES];
    int from = f * FRAGMENT_BYTES;
    int bytes = PROMPT_BYTES - from < FRAGMENT_BYTES ? PROMPT_BYTES - from : FRAGMENT_BYTES;
    memcpy(h + HELLO_BYTES, prompt_of(i) + from, bytes);
    header(h, DATA, i);
    put(h + 4, bytes, 2);
    put(h + 52, f, 2);
    put(h + 64, sip(key, h + HELLO_BYTES, bytes), 8);
    send_signed(h, HELLO_BYTES + bytes);
  }
  requests[i].sent_ns = now_ns(CLOCK_MONOTONIC);
}

static void send_ack(long i, uint64_t first_missing) {
  uint8_t h[HELLO_BYTES];
  header(h, ACK, i);
  put(h + 64, first_missing, 8);
  put(h + 80, 64, 8);
  send_signed(h, sizeof h);
}

static void delivered(struct request *r) {
  if (r->state >= DELIVERED) return;
  r->state = DELIVERED;
  on_way--;
}

static void take(const uint8_t *h) {
  uint64_t i = get(h + 16, 8) - base;
  if (i >= (uint64_t)total) return;
  struct request *r = &requests[i];
  if (h[3] == REJECT) {
    fprintf(stderr, "refused with code %d\n", (int)get(h + 14, 2));
    exit(1);
  }
  if (h[3] == GRANT && r->state == ASKED) {
    r->state = GRANTED;
    r->route = get(h + 32, 4);
    r->cookie = get(h + 56, 8);
    send_data(i);
  } else if (h[3] == ACK && get(h + 64, 8) == FRAGMENTS) delivered(r);
  else if (h[3] == END) {
    delivered(r);
    send_ack(i, get(h + 64, 8) + 1);
    if (r->state != ENDED) finish(r);
  }
}

static void receive_datagrams(void) {
  uint8_t h[2048];
  while (recv(udp, h, sizeof h, MSG_DONTWAIT) >= HELLO_BYTES) take(h);
}

/** What has got no answer for long goes again. */
static void repeat(void) {
  uint64_t now = now_ns(CLOCK_MONOTONIC);
  for (long i = 0; i < sent; i++) {
    if (requests[i].state > GRANTED || now - requests[i].sent_ns < REPEAT_NS) continue;
    if (requests[i].state == ASKED) send_hello(i);
    else send_data(i);
  }
}

// --- HTTP ----------------------------------------------------------------------------------------

static char *written(long i, long *bytes) {
  char *out = malloc(2 * PROMPT_BYTES + 512), *body = out + 256;
  int n = sprintf(body, "{\"model\":\"bench\",\"max_tokens\":1,\"prompt\":\"");
  for (const uint8_t *p = prompt_of(i); p < prompt_of(i) + PROMPT_BYTES; p++) {
    if (*p == '"' || *p == '\\' || *p == '\n') body[n++] = '\\';
    body[n++] = *p == '\n' ? 'n' : *p;
  }
  n += sprintf(body + n, "\"}");
  char head[256];
  int h = sprintf(head,
                  "POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                  "Content-Length: %d\r\n\r\n",
                  n);
  memcpy(body - h, head, h);
  *bytes = n + h;
  return body - h;
}

static void send_http(struct request *r) {
  while (r->left_bytes > 0) {
    ssize_t n = send(r->fd, r->left, r->left_bytes, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN) return;
    if (n < 0) die("send");
    r->left += n;
    r->left_bytes -= n;
  }
}

static void receive_http(struct request *r) {
  for (;;) {
    ssize_t n = recv(r->fd, r->answer + r->got, sizeof r->answer - 1 - r->got, MSG_DONTWAIT);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) die("recv");
    r->got += n;
    r->answer[r->got] = 0;
    char *blank = strstr(r->answer, "\r\n\r\n"), *said = strcasestr(r->answer, "content-length:");
    if (!blank || !said || r->got < blank + 4 - r->answer + atoi(said + 15)) continue;
    if (strncmp(r->answer + 9, "200", 3)) {
      fprintf(stderr, "%.200s\n", r->answer);
      exit(1);
    }
    on_way--;
    return finish(r);
  }
}

// --- Both ----------------------------------------------------------------------------------------

static int connected(int type, const char *address, int port) {
  int fd = socket(AF_INET, type, 0), one = 1, size = 4 << 20;
  struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
  to.sin_addr.s_addr = inet_addr(address);
  if (type == SOCK_DGRAM) setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size);
  if (connect(fd, (void *)&to, sizeof to)) die("connect");
  if (type == SOCK_STREAM) setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  return fd;
}

static void read_prompts(const char *path) {
  int fd = open(path, O_RDONLY);
  struct stat s;
  if (fd < 0 || fstat(fd, &s)) die(path);
  prompts = malloc(s.st_size);
  if (read(fd, prompts, s.st_size) != s.st_size) die(path);
  prompt_count = s.st_size / PROMPT_BYTES;
}

int main(int count, char **arg) {
  if (count < 10) return 2;
  int over_http = !strcmp(arg[1], "http"), port = atoi(arg[3]);
  total = atol(arg[4]);
  double rate = atof(arg[5]);
  long window = atol(arg[6]);
  read_prompts(arg[7]);
  tenant = atoi(arg[8]);
  for (int i = 0; i < 16; i++) sscanf(arg[9] + 2 * i, "%2hhx", &key[i]);
  base = now_ns(CLOCK_MONOTONIC) << 8;
  requests = calloc(total, sizeof *requests);
  samples = malloc(total * sizeof *samples);
  long sockets = over_http ? (window < total ? window : total) : 1;
  struct pollfd *polled = calloc(sockets, sizeof *polled);
  for (long i = 0; i < sockets; i++) {
    polled[i].fd = connected(over_http ? SOCK_STREAM : SOCK_DGRAM, arg[2], port);
    polled[i].events = POLLIN;
  }
  udp = polled[0].fd;
  // By connection: the request that it carries.
  long *carried = malloc(sockets * sizeof *carried);
  for (long i = 0; i < sockets; i++) carried[i] = -1;
  for (long i = 0; over_http && i < total; i++) {
    requests[i].left = written(i, &requests[i].left_bytes);
  }
  puts("ready");
  fflush(stdout);
  getchar();
  uint64_t start = now_ns(CLOCK_MONOTONIC), looked = start;
  while (ended < total) {
    uint64_t now = now_ns(CLOCK_MONOTONIC), next = 0;
    while (sent < total && on_way < window) {
      next = rate > 0 ? start + (uint64_t)(sent * 1e9 / rate) : 0;
      if (next > now) break;
      struct request *r = &requests[sent];
      r->began_ns = now_ns(CLOCK_MONOTONIC);
      r->state = ASKED;
      on_way++;
      if (over_http) {
        long free = 0;
        while (carried[free] >= 0) free++;
        carried[free] = sent;
        r->fd = polled[free].fd;
        send_http(r);
      } else send_hello(sent);
      sent++;
    }
    int64_t wait = next > now ? (int64_t)(next - now) : 50000000;
    struct timespec timeout = {0, wait > 50000000 ? 50000000 : wait};
    ppoll(polled, sockets, &timeout, 0);
    if (!over_http) receive_datagrams();
    for (long i = 0; over_http && i < sockets; i++) {
      if (carried[i] < 0) continue;
      struct request *r = &requests[carried[i]];
      send_http(r);
      if (polled[i].revents) receive_http(r);
      if (r->state == ENDED) carried[i] = -1;
    }
    if (!over_http && now - looked > REPEAT_NS) repeat(), looked = now;
  }
  long types[16] = {0};
  report(now_ns(CLOCK_MONOTONIC) - start, 0, total, types);
  return 0;
}
