"""Writes test/goldens/dequantized.json: of each tensor type's rows in test/arch/goldens/types, the
SHA-256 of the float32 numbers that they mean, little-endian.

Usage: python tools/goldens/dequantized.py test/arch/goldens/types test/goldens/dequantized.json
Needs: numpy, gguf (its dequantize is the oracle)
"""

import base64
import glob
import hashlib
import json
import sys

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize

COLUMNS = 256
ROWS = 24


def signs(name, rows):
    """Types that the gguf package lacks: a float16 scale, then one or two bits an element."""
    blocks = rows.reshape(-1, 18)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    if name == "Q1_0":
        return (np.unpackbits(blocks[:, 2:], axis=1, bitorder="little") * 2.0 - 1) * scale
    return ((blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(-1, 64) - 1.0) * scale


def main(folder, out):
    hashes = {}
    for path in sorted(glob.glob(f"{folder}/*.json")):
        for name, bank in json.load(open(path))["banks"].items():
            rows = np.frombuffer(base64.b64decode(bank), np.uint8).reshape(ROWS, -1)
            floats = signs(name, rows) if name in ("Q1_0", "Q2_0") else dequantize(rows, Type[name])
            data = np.ascontiguousarray(floats, np.float32).reshape(ROWS, COLUMNS).tobytes()
            hashes[name] = hashlib.sha256(data).hexdigest()
    with open(out, "w") as file:
        json.dump(dict(sorted(hashes.items())), file, indent=1)
        file.write("\n")


main(*sys.argv[1:3])
