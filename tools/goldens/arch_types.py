"""Writes test/arch/goldens/types/TYPE.json: rows of each tensor type that a GGUF file may have, and
the logits of a Llama whose matrices are made of them; also of one of mixed types.

Usage: python tools/goldens/arch_types.py test/arch/goldens/types
Needs: numpy, gguf (its quantize and dequantize are the oracle)

Matrices are too large to commit: each of their rows is one of the golden's rows, chosen by a
generator that test/arch/typed-model.ts has too. The logits are float64 sums over dequantized rows.
"""

import base64
import json
import sys

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 287, 256, 4, 2, 64
ROWS = 24
SPREAD = 1 / 16  # of weights: products keep the size of their input
POSITIONS = [27, 28, 39]  # ends of a chunk of 28, of a single token, of a chunk of 11
SEED = 20

# In the order in which their rows are chosen. name, rows; all have HIDDEN columns
MATRICES = [
    ("token_embd", VOCAB),
    ("attn_q", HEADS * HEAD_DIM),
    ("attn_k", KV_HEADS * HEAD_DIM),
    ("attn_v", KV_HEADS * HEAD_DIM),
    ("attn_output", HIDDEN),
    ("ffn_gate", HIDDEN),
    ("ffn_up", HIDDEN),
    ("ffn_down", HIDDEN),
    ("output", VOCAB),
]
# For activations, indices and statistics: no file has weights of these
NOT_WEIGHTS = {"I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K"}
# Names of types that the gguf package lacks, elements and bytes of a block
UNKNOWN = {"Q1_0": (128, 18), "Q2_0": (64, 18)}
# Where a block's scale lies, and that of its minima, with the mean of what they are subtracted from
SCALES = {
    "Q2_K": (80, 82, 1.5),
    "Q3_K": (108, None, 0),
    "Q4_K": (0, 2, 7.5),
    "Q5_K": (0, 2, 15.5),
    "Q6_K": (208, None, 0),
}


class Random:
    """mulberry32, as test/support/random.ts has it."""

    def __init__(self, seed):
        self.state = seed & 0xFFFFFFFF

    def below(self, bound):
        self.state = (self.state + 0x6D2B79F5) & 0xFFFFFFFF
        t = self.state
        t = ((t ^ (t >> 15)) * (t | 1)) & 0xFFFFFFFF
        t = (t ^ (t + (((t ^ (t >> 7)) * (t | 61)) & 0xFFFFFFFF))) & 0xFFFFFFFF
        return int(((t ^ (t >> 14)) & 0xFFFFFFFF) / 2**32 * bound)


def floats(name, rows):
    """Bytes [rows, bytes] to float64 [rows, HIDDEN]."""
    if name == "Q1_0":
        blocks = rows.reshape(-1, 18)
        signs = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little") * 2.0 - 1
    elif name == "Q2_0":
        blocks = rows.reshape(-1, 18)
        signs = (blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(-1, 64) - 1.0
    else:
        return dequantize(rows, Type[name]).astype(np.float64).reshape(len(rows), HIDDEN)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float64)
    return (signs * scale).reshape(len(rows), HIDDEN)


def random_rows(name, generator):
    """Random quants with scales that give weights of the usual size."""
    elements, size = UNKNOWN.get(name) or GGML_QUANT_SIZES[Type[name]]
    blocks = generator.integers(0, 256, (ROWS * HIDDEN // elements, size), dtype=np.uint8)
    if name == "Q2_0":  # as often below zero as above: -1, 0, 1 and 2 are its values
        quants = generator.choice([0, 0, 0, 0, 1, 1, 2, 2, 3], (len(blocks), 16, 4)).astype(np.uint8)
        blocks[:, 2:] = (quants << np.array([0, 2, 4, 6], np.uint8)).sum(axis=2)
    if name == "NVFP4":
        blocks[:, :4] = generator.integers(0x04, 0x10, (len(blocks), 4))
        return blocks.reshape(ROWS, -1)

    def scale(value):
        half = (value * generator.uniform(0.5, 1.5, len(blocks))).astype(np.float16)
        if name == "IQ1_M":  # four bits in each of the four words of scales
            words = blocks[:, 48:56].copy().view(np.uint16) & 0x0FFF
            words |= (half.view(np.uint16)[:, None] >> np.array([0, 4, 8, 12], np.uint16)) << 12
            blocks[:, 48:56] = words.view(np.uint8)
            return
        at, minimum, mean = SCALES.get(name, (0, None, 0))
        blocks[:, at : at + 2] = half[:, None].view(np.uint8)
        if minimum is not None:
            blocks[:, minimum : minimum + 2] = (half * mean).astype(np.float16)[:, None].view(np.uint8)

    scale(1.0)
    scale(SPREAD / floats(name, blocks.reshape(ROWS, -1)).std())
    return blocks.reshape(ROWS, -1)


def bank(name, generator):
    try:
        values = (generator.standard_normal((ROWS, HIDDEN)) * SPREAD).astype(np.float32)
        return quantize(values, Type[name]).view(np.uint8).reshape(ROWS, -1)
    except (NotImplementedError, KeyError):
        return random_rows(name, generator)


def as_read(x, name):
    """What is left of an input after ggml has rounded it to multiply with a type's weights."""
    if name == "F32":
        return x
    if name in ("F16", "BF16"):
        return dequantize(quantize(x.astype(np.float32), Type[name]), Type[name]).astype(np.float64)
    elements, _ = UNKNOWN.get(name) or GGML_QUANT_SIZES[Type[name]]
    size = 256 if elements == 256 else 32
    blocks = x.reshape(-1, size)
    steps = np.abs(blocks).max(axis=1, keepdims=True) / 127
    quants = np.rint(blocks / steps)
    if size == 32:
        steps = steps.astype(np.float16).astype(np.float64)
    return (quants * steps).reshape(x.shape)


def rms_norm(x, weight):
    return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + 1e-5) * weight


def rope(x, heads):
    """Interleaved pairs, as GGUF files of Llama are."""
    angles = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    turn = np.exp(1j * angles)[:, None, :]
    pairs = x.reshape(len(x), heads, HEAD_DIM // 2, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
    return np.stack([turned.real, turned.imag], axis=-1).reshape(len(x), heads, HEAD_DIM)


def logits(types, w, norms, tokens):
    def product(matrix, x):
        return as_read(x, types[matrix]) @ w[matrix].T

    x = w["token_embd"][tokens]
    h = rms_norm(x, norms[0])
    q = rope(product("attn_q", h), HEADS)
    k = rope(product("attn_k", h), KV_HEADS)
    v = product("attn_v", h).reshape(-1, KV_HEADS, HEAD_DIM)
    k, v = (np.repeat(t, HEADS // KV_HEADS, axis=1) for t in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / HEAD_DIM**0.5
    scores[:, np.triu(np.ones((len(x), len(x)), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    attended = np.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1)
    x = x + product("attn_output", attended)
    h = rms_norm(x, norms[1])
    gate = product("ffn_gate", h)
    x = x + product("ffn_down", gate / (1 + np.exp(-gate)) * product("ffn_up", h))
    return product("output", rms_norm(x, norms[2]))


def packed(array):
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def golden(types):
    """A model of these types by matrix, and its logits."""
    banks = {name: bank(name, np.random.default_rng(SEED)) for name in sorted(set(types.values()))}
    values = {name: floats(name, rows) for name, rows in banks.items()}
    random = Random(SEED)
    weights = {m: values[types[m]][[random.below(ROWS) for _ in range(n)]] for m, n in MATRICES}
    norms = [np.array([0.5 + random.below(256) / 256 for _ in range(HIDDEN)]) for _ in range(3)]
    tokens = [random.below(VOCAB) for _ in range(40)]
    result = logits(types, weights, norms, tokens)[POSITIONS]
    return dict(
        types=types,
        seed=SEED,
        banks={name: packed(rows) for name, rows in banks.items()},
        positions=POSITIONS,
        logits=packed(result.astype(np.float16)),
    )


def main(out):
    names = sorted({t.name for t in Type} - NOT_WEIGHTS | set(UNKNOWN))
    models = {name: {matrix: name for matrix, _ in MATRICES} for name in names}
    models["Q4_K_M"] = dict(models["Q4_K"], attn_v="Q6_K", ffn_down="Q6_K", output="Q6_K")
    for name, types in models.items():
        with open(f"{out}/{name}.json", "w") as file:
            json.dump(golden(types), file, separators=(",", ":"))
            file.write("\n")


main(sys.argv[1])
