# Owns the other side of `lattice bench gpu`'s attention: PyTorch's scaled_dot_product_attention on
# the shapes that it is given, with cuDNN and FlashAttention, timed as the kernels of Lattice are.
#
# stdin: {"decode": [{"batch", "context"}], "prefill": [{"batch", "tokens"}], "heads", "kvHeads",
# "headDim", "runs"}; stdout: the same cases with microseconds by backend, null where it refuses.
# Medians of CUDA graphs' replays between events. KV is contiguous, the layout that suits SDPA best;
# prefill has a KV head for each query head, which is faster there than grouped heads.

import json
import statistics
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def median_us(run, launches, runs):
    """Median time of one launch; `run` queues `launches` of them."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for i in range(runs + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) / launches * 1e3)
    return statistics.median(times)


def measure(name, run, launches, runs):
    try:
        with sdpa_kernel(BACKENDS[name]):
            return median_us(run, launches, runs)
    except RuntimeError as refused:
        print(f"{name}: {str(refused)[:200]}", file=sys.stderr)
        return None


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def prefill(case, job):
    heads, dim = job["heads"], job["headDim"]
    q, k, v = (random(case["batch"], heads, case["tokens"], dim) for _ in range(3))
    run = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return {**case, **{name: measure(name, run, 1, job["runs"]) for name in BACKENDS}}


def decode(case, job):
    heads, kv_heads, dim = job["heads"], job["kvHeads"], job["headDim"]
    batch, context = case["batch"], case["context"]
    q = random(batch, heads, 1, dim)
    # As many sets as do not fit in the cache together.
    sets = max(1, 256 * 2**20 // (batch * context * kv_heads * dim * 4))
    kv = [[random(batch, kv_heads, context, dim) for _ in range(2)] for _ in range(sets)]

    def run():
        for k, v in kv:
            F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return {**case, **{name: measure(name, run, sets, job["runs"]) for name in BACKENDS}}


job = json.load(sys.stdin)
json.dump(
    {
        "torch": torch.__version__,
        "decode": [decode(case, job) for case in job["decode"]],
        "prefill": [prefill(case, job) for case in job["prefill"]],
    },
    sys.stdout,
)
