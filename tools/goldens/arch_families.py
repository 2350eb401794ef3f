"""Writes test/arch/goldens/FAMILY/: tiny random models of every family as transformers saves them,
each with golden.json: token sequences and the logits that transformers computes for them in
float32 on a CPU.

Usage: python tools/goldens/arch_families.py test/arch/goldens
Needs: transformers 5, torch

golden.json holds for each sequence, at every position: argmax, the gap between the two largest
logits, the root mean square of the row, and the logits of 8 fixed columns; at some positions the
whole row. Numbers are base64 of little-endian float32.
"""

import base64
import json
import os
import shutil
import sys

import torch
from transformers import AutoModelForCausalLM, CONFIG_MAPPING

VOCAB = 288
COLUMNS = list(range(7, VOCAB, 36))
LENGTHS = (160, 70, 33)
LONG = (640, 70, 33)  # past where a lone query's keys are split between threads
WINDOWED = (330, 70, 33)  # lengths so different that sequences are not attended together

BASE = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=1024,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=None,
    tie_word_embeddings=True,
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=512)

# Settings are such that each shows in the logits, such as an epsilon that is no rounding error.
# name: (family, configuration, dtype, lengths, largest shard)
CASES = {
    "llama2": (
        "llama",
        dict(BASE, intermediate_size=32, num_key_value_heads=2, tie_word_embeddings=False, rms_norm_eps=0.1),
        torch.float16,
        LONG,
        None,
    ),
    "llama3": (
        "llama",
        dict(BASE, head_dim=64, rope_theta=50000.0, rope_scaling=LLAMA3),
        torch.bfloat16,
        LENGTHS,
        "60KB",
    ),
    "llama-biased": (
        "llama",
        dict(
            BASE,
            intermediate_size=32,
            attention_bias=True,
            mlp_bias=True,
            rope_scaling=dict(rope_type="linear", factor=4.0),
        ),
        torch.float32,
        LENGTHS,
        None,
    ),
    "mistral": (
        "mistral",
        dict(BASE, num_attention_heads=4, num_key_value_heads=2, head_dim=32, intermediate_size=32, sliding_window=24),
        torch.float16,
        WINDOWED,
        None,
    ),
    "qwen2": (
        "qwen2",
        dict(BASE, rope_theta=1000000.0, use_sliding_window=True, sliding_window=40, max_window_layers=1),
        torch.float16,
        LENGTHS,
        None,
    ),
    "qwen3": (
        "qwen3",
        dict(BASE, head_dim=96, intermediate_size=32, rope_theta=1000000.0, rms_norm_eps=0.1),
        torch.float16,
        LENGTHS,
        None,
    ),
    "qwen3-yarn": (
        "qwen3",
        dict(BASE, head_dim=128, intermediate_size=32, rope_theta=100000.0, rope_scaling=YARN),
        torch.float16,
        LENGTHS,
        None,
    ),
    "gemma3": (
        "gemma3_text",
        dict(
            BASE,
            num_hidden_layers=6,
            intermediate_size=32,
            head_dim=32,
            sliding_window=20,
            sliding_window_pattern=3,
            query_pre_attn_scalar=24,
            rms_norm_eps=0.1,
            hidden_activation="gelu_pytorch_tanh",
        ),
        torch.float16,
        WINDOWED,
        None,
    ),
    "gemma3-scaled": (
        "gemma3_text",
        dict(
            BASE,
            num_hidden_layers=3,
            num_key_value_heads=2,
            intermediate_size=32,
            head_dim=32,
            sliding_window=48,
            sliding_window_pattern=3,
            query_pre_attn_scalar=32,
            rope_theta=20000.0,
            rope_local_base_freq=5000.0,
            rope_scaling=dict(rope_type="linear", factor=2.5),
            hidden_activation="gelu_pytorch_tanh",
        ),
        torch.bfloat16,
        LENGTHS,
        None,
    ),
}


# Matrices of these are such that Q4_0 holds them exactly: test/arch/quantized.test.ts
FOUR_BITS = ("llama-biased", "qwen2", "qwen3", "gemma3")


def four_bits(weight):
    """The nearest matrix of blocks of 32 in [-8, 7] times a power of two; each has a -8."""
    blocks = weight.reshape(-1, 32)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    scale = 2.0 ** torch.ceil(torch.log2(largest / 8.5))
    quants = (blocks / scale).round().clamp(-8, 7)
    quants.scatter_(1, blocks.abs().argmax(dim=1, keepdim=True), -8.0)
    return (quants * scale).reshape(weight.shape)


def fill(model, generator, exact):
    """Weights large enough that attention has favourites: a wrong mask or angle must show."""
    gemma = model.config.model_type == "gemma3_text"
    for name, weight in model.named_parameters():
        random = torch.randn(weight.shape, generator=generator)
        if name.endswith("bias"):
            value = random * 0.5
        elif weight.dim() == 1:
            value = random * 0.2 + (0 if gemma else 1)
        elif "embed_tokens" in name:
            value = random * (0.125 if gemma else 1)
        else:
            value = random / weight.shape[1] ** 0.5
            if "q_proj" in name:
                value = value * 1.5
        weight.data = four_bits(value) if exact and weight.dim() == 2 else value


def packed(tensor):
    return base64.b64encode(tensor.contiguous().to(torch.float32).numpy().tobytes()).decode()


def golden(model, lengths, generator):
    sequences = []
    for length in lengths:
        tokens = torch.randint(2, VOCAB, (length,), generator=generator)
        with torch.no_grad():
            logits = model(tokens[None], use_cache=False).logits[0]
        top = logits.topk(2, dim=1)
        whole = [0, 24, length // 2, length - 1]
        sequences.append(
            dict(
                tokens=tokens.tolist(),
                argmax=top.indices[:, 0].tolist(),
                gap=packed(top.values[:, 0] - top.values[:, 1]),
                rms=packed(logits.square().mean(dim=1).sqrt()),
                sampled=packed(logits[:, COLUMNS]),
                wholePositions=whole,
                whole=packed(logits[whole]),
            )
        )
    return dict(vocab=VOCAB, columns=COLUMNS, sequences=sequences)


def main(out):
    for seed, (name, (family, settings, dtype, lengths, shard)) in enumerate(CASES.items()):
        folder = f"{out}/{name}"
        shutil.rmtree(folder, ignore_errors=True)
        generator = torch.Generator().manual_seed(seed + 1)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings))
        fill(model, generator, name in FOUR_BITS)
        model.to(dtype).save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
        reference = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        with open(f"{folder}/golden.json", "w") as file:
            json.dump(golden(reference, lengths, generator), file, separators=(",", ":"))
            file.write("\n")
        # Text is not what these models are for, but a directory without a tokenizer is no model.
        with open(f"{folder}/tokenizer.json", "w") as file:
            file.write("{}\n")
        for file in os.listdir(folder):
            os.chmod(f"{folder}/{file}", 0o644)
        sizes = sum(os.path.getsize(f"{folder}/{file}") for file in os.listdir(folder))
        print(f"{name}: {sizes / 1000:.0f} kB")


main(sys.argv[1])
