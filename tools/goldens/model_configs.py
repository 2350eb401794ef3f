"""Writes test/goldens/model-configs.json: config.json files of each family as transformers saves
them (and as older versions did), with what transformers makes of each: rope frequencies, window
layers, attention scale, and the names and shapes of its tensors.

Usage: python tools/goldens/model_configs.py > test/goldens/model-configs.json
Needs: transformers 5, torch
"""

import json
import math
import tempfile

import torch
from transformers import AutoConfig, AutoModelForCausalLM, CONFIG_MAPPING

SMALL = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32768)

# name, config.json as it was written, by hand for old layouts, else None: saved by transformers
CASES = [
    ("llama", "llama", dict(SMALL, rope_theta=100000.0, tie_word_embeddings=True)),
    ("llama-biased", "llama", dict(SMALL, attention_bias=True, mlp_bias=True)),
    ("llama-linear", "llama", dict(SMALL, rope_scaling=dict(type="linear", factor=2.0))),
    (
        "llama3",
        "llama",
        dict(SMALL, head_dim=128, rope_theta=500000.0, rope_scaling=LLAMA3, max_position_embeddings=131072),
    ),
    ("mistral", "mistral", dict(SMALL, sliding_window=4096, head_dim=8)),
    ("mistral-unbounded", "mistral", dict(SMALL, sliding_window=None)),
    ("qwen2", "qwen2", dict(SMALL, rope_theta=1000000.0)),
    (
        "qwen2-window",
        "qwen2",
        dict(SMALL, num_hidden_layers=4, use_sliding_window=True, sliding_window=32, max_window_layers=2),
    ),
    ("qwen2-yarn", "qwen2", dict(SMALL, head_dim=4, rope_scaling=YARN, max_position_embeddings=131072)),
    ("qwen3", "qwen3", dict(SMALL, head_dim=8, rope_theta=1000000.0, tie_word_embeddings=True)),
    (
        "qwen3-yarn",
        "qwen3",
        dict(SMALL, head_dim=64, rope_scaling=dict(YARN, attention_factor=1.25, beta_fast=16.0)),
    ),
    (
        "gemma3",
        "gemma3_text",
        dict(SMALL, num_hidden_layers=7, head_dim=8, sliding_window=32, query_pre_attn_scalar=16),
    ),
    (
        "gemma3-linear",
        "gemma3_text",
        dict(SMALL, num_hidden_layers=6, head_dim=8, rope_scaling=dict(rope_type="linear", factor=8.0)),
    ),
    (
        "gemma3-pattern",
        "gemma3_text",
        dict(SMALL, num_hidden_layers=4, head_dim=8, sliding_window_pattern=2, rope_local_base_freq=5000.0),
    ),
]


def rope(config, layer_type=None):
    """Inverse frequencies and the factor on cos and sin, by the model's own rotary module."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config.standardize_rope_params()
    settings = config.rope_parameters
    settings = settings[layer_type] if layer_type else settings
    kind = settings["rope_type"]
    if kind == "default":
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        steps = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
        return (1.0 / settings["rope_theta"] ** steps).tolist(), 1.0
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", layer_type=layer_type)
    return frequencies.tolist(), factor


def expected(config):
    gemma = config.model_type == "gemma3_text"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = bool(config.tie_word_embeddings)
    tensors = {k: list(v.shape) for k, v in model.state_dict().items() if not (tied and k == "lm_head.weight")}
    attention = model.model.layers[0].self_attn
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if types is None:
        types = ["sliding_attention" if window else "full_attention"] * config.num_hidden_layers
    frequencies, factor = rope(config, "full_attention" if gemma else None)
    result = dict(
        frequencies=frequencies,
        cosSinFactor=factor,
        window=window if "sliding_attention" in types else None,
        local=[kind == "sliding_attention" for kind in types],
        attentionScale=attention.scaling,
        embeddingScale=math.sqrt(config.hidden_size) if gemma else 1.0,
        normEps=config.rms_norm_eps,
        headDim=attention.head_dim,
        kvHeads=config.num_key_value_heads,
        contextLength=config.max_position_embeddings,
        tied=tied,
        tensors=tensors,
    )
    if gemma:
        result["localFrequencies"] = rope(config, "sliding_attention")[0]
    return result


def main():
    goldens = []
    for name, kind, settings in CASES:
        old = dict(settings, model_type=kind)
        config = CONFIG_MAPPING[kind](**settings)
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            saved = json.load(open(f"{folder}/config.json"))
            loaded = AutoConfig.from_pretrained(folder)
        goldens.append(dict(name=name, old=old, saved=saved, expected=expected(loaded)))
    print(json.dumps(goldens, indent=1))


main()
