"""Owns a client of the datagram protocol that shares no code with ours: written from
docs/protocol.md alone, in Python's standard library, so that the document is enough.

One JSON object on stdin says what to ask, one on stdout how it went.
"""

import json
import re
import secrets
import select
import socket
import struct
import sys
import time

HELLO, GRANT, REJECT, DATA, ACK, TOKENS, END, CANCEL = range(1, 9)
CHAT, RAW, RETRY = 1, 2, 4
FRAGMENT = 1200
LADDER = [1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152, 65536]
MASK = 0xFFFFFFFFFFFFFFFF
# magic version type payload flags | tenant key code | request | time | route model |
# promptBytes maxTokens | deadlineMs fragment fragments | four words
HEADER = struct.Struct(">HBBHHIHHQQIIIIIHH4Q")


def siphash(key, data):
    """SipHash-2-4 (Aumasson and Bernstein, 2012), 64 bits."""

    def rotate(x, by):
        return ((x << by) | (x >> (64 - by))) & MASK

    k0, k1 = struct.unpack("<QQ", key)
    v0, v1 = k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D
    v2, v3 = k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573

    def rounds(count):
        nonlocal v0, v1, v2, v3
        for _ in range(count):
            v0 = (v0 + v1) & MASK
            v1 = rotate(v1, 13) ^ v0
            v0 = rotate(v0, 32)
            v2 = (v2 + v3) & MASK
            v3 = rotate(v3, 16) ^ v2
            v0 = (v0 + v3) & MASK
            v3 = rotate(v3, 21) ^ v0
            v2 = (v2 + v1) & MASK
            v1 = rotate(v1, 17) ^ v2
            v2 = rotate(v2, 32)

    whole = len(data) & ~7
    tail = data[whole:] + bytes(7 - (len(data) & 7)) + bytes([len(data) & 255])
    for (word,) in struct.iter_unpack("<Q", data[:whole] + tail):
        v3 ^= word
        rounds(2)
        v0 ^= word
    v2 ^= 0xFF
    rounds(4)
    return v0 ^ v1 ^ v2 ^ v3


def fnv1a(text):
    value = 0x811C9DC5
    for byte in text.encode():
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return value


def prefix_words(key, prompt):
    """What HELLO says of a prompt: hashes of its four longest prefixes."""
    sizes = [size for size in LADDER if size <= len(prompt)][-4:]
    return [siphash(key, prompt[:size]) for size in sizes] + [0] * (4 - len(sizes))


class Refused(Exception):
    """The server said no: a code of the protocol, and after how many ms to ask again."""


class Client:
    def __init__(self, asked):
        self.key = bytes.fromhex(asked["key"])
        self.key_index = asked.get("keyIndex", 0)
        self.tenant = asked["tenant"]
        self.prompt = asked["prompt"].encode()
        self.max_tokens = asked["maxTokens"]
        self.flags = (CHAT if asked.get("chat") else 0) | (RAW if asked.get("raw") else 0)
        self.model = fnv1a(asked["model"]) if "model" in asked else 0
        temperature, top_p = asked.get("temperature", 0.0), asked.get("topP", 0.0)
        self.sampling = struct.unpack(">Q", struct.pack(">ff", temperature, top_p))[0]
        self.seed = asked.get("seed", 0)
        self.cancel_after = asked.get("cancelAfter")
        self.change = asked.get("change", {})
        self.request = secrets.randbits(64)
        self.route, self.cookie, self.credit = 0, 0, 1
        family = socket.AF_INET6 if ":" in asked["host"] else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.connect((asked["host"], asked.get("port", 7411)))
        self.fragments = [
            self.prompt[at : at + FRAGMENT] for at in range(0, len(self.prompt), FRAGMENT)
        ]

    def send(self, kind, words=(0, 0, 0, 0), payload=b"", flags=0, fragment=0, fragments=0):
        sized = {"promptBytes": len(self.prompt), "maxTokens": self.max_tokens}
        if kind != HELLO:
            sized.update(self.change)
        header = HEADER.pack(
            *(0x4C54, 1, kind, len(payload), flags),
            *(self.tenant, self.key_index, 0),
            *(self.request, time.time_ns() // 1000),
            *(self.route, self.model),
            *(sized["promptBytes"], sized["maxTokens"]),
            *(0, fragment, fragments),
            *words,
        )
        self.socket.send(header + struct.pack(">Q", siphash(self.key, header)) + payload)

    def receive(self, seconds):
        """A datagram of this request as (type, code, retry, words, route, payload), or None."""
        if not select.select([self.socket], [], [], seconds)[0]:
            return None
        datagram = self.socket.recv(2048)
        header, mac, payload = datagram[:88], datagram[88:96], datagram[96:]
        if len(datagram) < 96 or struct.unpack(">Q", mac)[0] != siphash(self.key, header):
            return None
        magic, version, kind, size, _, tenant, _, code, request, _, route, *rest = HEADER.unpack(
            header
        )
        if magic != 0x4C54 or size != len(payload):
            return None
        if (tenant, request) != (self.tenant, self.request):
            return None
        return kind, code, rest[3], rest[6:], route, payload

    def ask(self):
        words = prefix_words(self.key, self.prompt) if self.key_index == 0 else [0] * 4
        wait = 0.1
        for attempt in range(6):
            flags = RETRY if attempt else 0
            self.send(HELLO, words, flags=flags, fragments=len(self.fragments))
            answer = self.receive(wait)
            wait *= 2
            if answer is None:
                continue
            kind, code, retry, words_back, route, _ = answer
            if kind == REJECT:
                raise Refused(code, retry)
            if kind == GRANT:
                self.route, self.cookie, self.credit = route, words_back[0], words_back[1]
                return
        raise TimeoutError("no answer")

    def run(self):
        self.ask()
        sent, missing, arrived = {}, 0, set()
        received, first_missing = {}, 0
        heard = time.monotonic()
        end, text, tokens = None, b"", []
        cancelled = False
        while end is None or first_missing <= end[0]:
            now = time.monotonic()
            if now - heard > 12:
                raise TimeoutError("the server is gone")
            for number in range(missing, min(len(self.fragments), missing + max(1, self.credit))):
                if number in arrived or now - sent.get(number, -1) < 0.05:
                    continue
                sent[number] = now
                payload = self.fragments[number]
                words = (self.cookie, siphash(self.key, payload), self.sampling, self.seed)
                self.send(DATA, words, payload, self.flags, fragment=number)
            answer = self.receive(0.02)
            if answer is None:
                continue
            heard = time.monotonic()
            kind, code, _, words, _, payload = answer
            if words[0] != self.cookie:
                continue
            if kind == ACK:
                missing = max(missing, words[1])
                arrived |= {words[1] + 1 + bit for bit in range(64) if words[2] >> bit & 1}
                self.credit = words[3]
                continue
            if kind == TOKENS and siphash(self.key, payload) == words[1]:
                received[words[2]] = (words[3], payload)
            elif kind == END:
                end = (words[1], code, words[2], words[3] >> 32, words[3] & 0xFFFFFFFF)
                received[words[1]] = None
            while first_missing in received:
                item = received[first_missing]
                first_missing += 1
                if item is None:
                    continue
                first, body = item
                (count,) = struct.unpack_from(">H", body)
                if first != len(tokens):
                    raise ValueError(f"token {first} comes as number {len(tokens)}")
                tokens += struct.unpack_from(f">{count}I", body, 2)
                text += body[2 + 4 * count :]
            bits = 0
            for number in received:
                if first_missing < number <= first_missing + 64:
                    bits |= 1 << (number - first_missing - 1)
            self.send(ACK, (self.cookie, first_missing, bits, 64))
            if self.cancel_after is not None and not cancelled and len(text) >= self.cancel_after:
                cancelled = True
                self.send(CANCEL, (self.cookie, 0, 0, 0))
        return {
            "text": text.decode(),
            "tokens": len(tokens),
            "code": end[1],
            "outputTokens": end[2],
            "promptTokens": end[3],
            "cachedTokens": end[4],
        }


def vectors(path):
    """How many of the document's test vectors hold here; raises for one that does not."""
    with open(path, encoding="utf-8") as file:
        blocks = re.findall(r"```text\nvector (\w+)\n([0-9a-f\n]+)```", file.read())
    key = bytes(range(16))
    secret = bytes(range(0xF0, 0x100))
    prompt = b"Why is the sky blue? " * 60
    found = {name: bytes.fromhex(block.replace("\n", "")) for name, block in blocks}
    for name, datagram in found.items():
        header, mac, payload = datagram[:88], datagram[88:96], datagram[96:]
        assert struct.unpack(">Q", mac)[0] == siphash(key, header), f"the MAC of {name}"
        assert HEADER.unpack(header)[3] == len(payload), f"the length of {name}"
        if name in ("data", "tokens"):
            assert HEADER.unpack(header)[-3] == siphash(key, payload), f"the payload of {name}"
    hello = HEADER.unpack(found["hello"][:88])
    assert hello[-4:] == (siphash(key, prompt[:1024]), 0, 0, 0), "the prefix of hello"
    assert hello[11] == fnv1a("smollm2"), "the model of hello"
    assert found["data"][96:] == prompt[FRAGMENT:], "the prompt in data"
    proof = struct.pack(">IIQ", 5, 3, hello[8]) + bytes(10) + b"\xff\xff\x0a\x01\x02\x03"
    cookie = siphash(secret, proof + struct.pack(">I", 40000))
    for name in set(found) - {"hello"}:
        assert HEADER.unpack(found[name][:88])[-4] == cookie, f"the cookie of {name}"
    return len(found)


def main():
    asked = json.load(sys.stdin)
    if "prefixes" in asked:
        key, prompt = bytes.fromhex(asked["key"]), asked["prefixes"].encode()
        json.dump({"words": [str(word) for word in prefix_words(key, prompt)]}, sys.stdout)
        return
    if "vectors" in asked:
        json.dump({"vectors": vectors(asked["vectors"])}, sys.stdout)
        return
    try:
        answer = Client(asked).run()
    except Refused as refused:
        answer = {"refused": refused.args[0], "retryMs": refused.args[1]}
    except TimeoutError as timeout:
        answer = {"silent": str(timeout)}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
