"""Takes all of a GPU's free memory, and whatever becomes free, for so many seconds.

Usage: python bench/gpu-memory-taken.py SECONDS   (bench/gpu-memory-taken.ts runs it)
"""

import sys
import time

import torch

held, size = [], 1 << 30
while size >= 1 << 20:
    try:
        held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    except torch.cuda.OutOfMemoryError:
        size >>= 1
print("took", sum(block.numel() for block in held) >> 20, "MiB", flush=True)
end = time.time() + float(sys.argv[1])
while time.time() < end:
    time.sleep(0.02)
    if torch.cuda.mem_get_info()[0] > 8 << 20:
        try:
            held.append(torch.empty(4 << 20, dtype=torch.uint8, device="cuda"))
        except torch.cuda.OutOfMemoryError:
            pass
print("gives back", sum(block.numel() for block in held) >> 20, "MiB", flush=True)
