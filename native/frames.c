// Owns the way through Ethernet, VLAN, IP and UDP of a frame, the frames that go back to where one
// came from, and the hash of what is in them. src/net/frame.ts does the same.

#include "flows.h"

#include <string.h>

#include "../bpf/siphash.h"

#define ETHERTYPE_IPV4 0x0800
#define ETHERTYPE_IPV6 0x86dd
#define ETHERTYPE_VLAN 0x8100
#define ETHERTYPE_SERVICE_VLAN 0x88a8
#define UDP_BYTES 8
#define VLANS_MAX 2

bool lt_layout_of(const uint8_t *frame, uint32_t bytes, struct lt_layout *layout) {
  uint32_t ip = 14;
  if (bytes < ip + 20) return false;
  uint32_t type = lt_get(frame + 12, 2);
  for (int i = 0; i < VLANS_MAX; i++) {
    if (type != ETHERTYPE_VLAN && type != ETHERTYPE_SERVICE_VLAN) break;
    if (bytes < ip + 4 + 20) return false;
    type = lt_get(frame + ip + 2, 2);
    ip += 4;
  }
  if (type != ETHERTYPE_IPV4 && type != ETHERTYPE_IPV6) return false;
  uint32_t ip_bytes = type == ETHERTYPE_IPV4 ? (frame[ip] & 15) * 4 : 40;
  uint32_t udp = ip + ip_bytes;
  if (ip_bytes < 20 || bytes < udp + UDP_BYTES) return false;
  uint32_t udp_bytes = lt_get(frame + udp + 4, 2);
  if (udp_bytes < UDP_BYTES + sizeof(struct lt_header) || udp + udp_bytes > bytes) return false;
  *layout = (struct lt_layout){
      .ip = ip,
      .udp = udp,
      .data = udp + UDP_BYTES,
      .data_bytes = udp_bytes - UDP_BYTES,
      .version = type == ETHERTYPE_IPV4 ? 4 : 6,
  };
  return true;
}

static void swap(uint8_t *a, uint8_t *b, size_t bytes) {
  uint8_t saved[16];
  memcpy(saved, a, bytes);
  memcpy(a, b, bytes);
  memcpy(b, saved, bytes);
}

void lt_keep_head(struct lt_flow *flow, const uint8_t *frame, const struct lt_layout *layout) {
  uint8_t *head = flow->head, *ip = head + layout->ip;
  bool is_ipv4 = layout->version == 4;
  // At most 14 + 2 * 4 + 60 + 8.
  memcpy(head, frame, layout->data);
  flow->head_bytes = layout->data;
  flow->ip = layout->ip;
  flow->version = layout->version;
  swap(head, head + 6, 6);
  if (is_ipv4) swap(ip + 12, ip + 16, 4);
  else swap(ip + 8, ip + 24, 16);
  swap(head + layout->udp, head + layout->udp + 2, 2);
  ip[is_ipv4 ? 8 : 7] = 64;
}

/** The Internet checksum (RFC 1071), beginning with a sum. */
static uint16_t checksum(const uint8_t *at, uint32_t bytes, uint64_t sum) {
  uint32_t i = 0;
  for (; i + 2 <= bytes; i += 2) sum += (uint64_t)at[i] << 8 | at[i + 1];
  if (i < bytes) sum += (uint64_t)at[i] << 8;
  while (sum >> 16) sum = (sum & 0xffff) + (sum >> 16);
  return ~sum;
}

uint32_t lt_seal(const struct lt_flow *flow, uint8_t *frame, uint32_t data_bytes) {
  uint8_t *ip = frame + flow->ip, *udp = frame + flow->head_bytes - UDP_BYTES;
  uint32_t udp_bytes = UDP_BYTES + data_bytes, ip_bytes = udp - ip;
  bool is_ipv4 = flow->version == 4;
  memcpy(frame, flow->head, flow->head_bytes);
  lt_put(udp + 4, udp_bytes, 2);
  lt_put(udp + 6, 0, 2);
  if (is_ipv4) {
    ip[1] = 0;
    lt_put(ip + 2, ip_bytes + udp_bytes, 2);
    lt_put(ip + 10, 0, 2);
    lt_put(ip + 10, checksum(ip, ip_bytes, 0), 2);
  } else {
    lt_put(ip, 0x6000, 2);
    lt_put(ip + 4, udp_bytes, 2);
  }
  uint16_t addresses = is_ipv4 ? checksum(ip + 12, 8, 0) : checksum(ip + 8, 32, 0);
  uint16_t sum = checksum(udp, udp_bytes, 17 + udp_bytes + (uint16_t)~addresses);
  lt_put(udp + 6, sum == 0 ? 0xffff : sum, 2);
  return flow->head_bytes + data_bytes;
}

uint64_t lt_sip(const struct lt_key *key, const uint8_t *data, size_t bytes) {
  struct sip s;
  sip_begin(&s, key->k0, key->k1);
  size_t i = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t word;
    memcpy(&word, data + i, 8);
    sip_word(&s, word);
  }
  uint64_t tail = (uint64_t)bytes << 56;
  for (int shift = 0; i < bytes; i++, shift += 8) tail |= (uint64_t)data[i] << shift;
  return sip_end(&s, tail);
}
