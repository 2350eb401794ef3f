"""Writes src/text/goldens/*.json: small tokenizers of every family, and how Hugging Face's
tokenizers library encodes and decodes a list of nasty strings with each.

Run: python tools/goldens/text_tokenizers.py [--train]      (needs: pip install tokenizers)

Training breaks ties at random, so that a tokenizer once written is kept unless --train is given:
a run without it writes the same files again.
"""

import json
import pathlib
import sys

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from text_corpus import CORPUS, STRINGS

OUT = pathlib.Path(__file__).parents[2] / "src/text/goldens"

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
GPT4 = (
    CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
POSSESSIVE = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD = r"[^\r\n\p{L}\p{N}]?"
GPT4O = (
    rf"{WORD}{UPPER}*{LOWER}+{CONTRACTIONS}?|{WORD}{UPPER}+{LOWER}*{CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{TAIL}"
)
TEKKEN = rf"{WORD}{UPPER}*{LOWER}+|{WORD}{UPPER}+{LOWER}*|\p{{N}}|{TAIL}"
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
HAN = (
    r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{L}&&[^\p{Han}]]+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"
)


def byte_level(words=True, prefix=False):
    return pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=words)


def splits(*patterns, last=None):
    steps = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns]
    return pre_tokenizers.Sequence(steps + [last or byte_level(words=False)])


def train(tokenizer, trainer):
    tokenizer.train_from_iterator(CORPUS.split("\n"), trainer)
    return tokenizer


def byte_bpe(pre, size=420, normalizer=None, alphabet=True, **model):
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    initial = pre_tokenizers.ByteLevel.alphabet() if alphabet else []
    special = [model["unk_token"]] if "unk_token" in model else []
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=initial, special_tokens=special, show_progress=False
    )
    train(tokenizer, trainer)
    tokenizer.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    return tokenizer


def byte_fallback_bpe(normalizer, pre, decoder, **model):
    """As conversion from SentencePiece makes them: merges over characters, bytes as entries."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer, tokenizer.decoder = normalizer, decoder
    if pre:
        tokenizer.pre_tokenizer = pre
    specials = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    # Training sees words, so that entries do not span them; encoding sees the whole text.
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.Split(Regex("(?<!▁)▁"), "merged_with_next")
    train(
        trained,
        trainers.BpeTrainer(
            vocab_size=560, limit_alphabet=70, special_tokens=specials, show_progress=False
        ),
    )
    state = json.loads(trained.to_str())["model"]
    whole = json.loads(tokenizer.to_str())
    whole["model"].update(vocab=state["vocab"], merges=state["merges"], **model)
    tokenizer = Tokenizer.from_str(json.dumps(whole))
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False) for t in ["<unk>", "<s>", "</s>", "<|end|>"]]
    )
    return tokenizer


def unigram(pre, decoder, byte_fallback, normalizer=None):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoder
    if normalizer:
        tokenizer.normalizer = normalizer
    specials = ["<unk>"] + ([f"<0x{b:02X}>" for b in range(256)] if byte_fallback else [])
    train(
        tokenizer,
        trainers.UnigramTrainer(
            vocab_size=560 if byte_fallback else 300,
            unk_token="<unk>",
            special_tokens=specials,
            show_progress=False,
        ),
    )
    state = json.loads(tokenizer.to_str())
    state["model"]["byte_fallback"] = byte_fallback
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] == "<unk>"]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([AddedToken("<|end|>", normalized=False)])
    return tokenizer


def framed(tokenizer, before=(), after=()):
    for token in [*before, *after]:
        tokenizer.add_special_tokens([AddedToken(token, normalized=False)])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=" ".join([*before, "$A", *after]),
                special_tokens=[(t, tokenizer.token_to_id(t)) for t in [*before, *after]],
            ),
        ]
    )
    return tokenizer


def with_added(tokenizer):
    """Every flag an added token may have."""
    tokenizer.add_tokens(
        [
            AddedToken("<pad>", lstrip=True, rstrip=True, normalized=False),
            AddedToken("[W]", single_word=True, normalized=False),
            AddedToken("norm", normalized=True),
            AddedToken("long token", normalized=False),
            AddedToken("<|long|>", special=True, rstrip=True, normalized=False),
            AddedToken("<|lo", normalized=False),
        ]
    )
    return tokenizer


spm_decoder = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)
gemma_decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
)
N, P = normalizers, pre_tokenizers

TOKENIZERS = {
    "gpt2": lambda: byte_bpe(byte_level()),
    "gpt2-prefix-space": lambda: framed(byte_bpe(byte_level(prefix=True)), ["<s>"], ["</s>"]),
    "added": lambda: with_added(byte_bpe(byte_level())),
    "smollm": lambda: byte_bpe(P.Sequence([P.Digits(True), byte_level()])),
    "llama3": lambda: framed(byte_bpe(splits(GPT4), ignore_merges=True), ["<s>"]),
    "qwen2": lambda: byte_bpe(splits(GPT4.replace("{1,3}", "")), normalizer=N.NFC()),
    "gpt4o": lambda: byte_bpe(splits(GPT4O)),
    "tekken": lambda: byte_bpe(splits(TEKKEN), ignore_merges=True),
    "deepseek3": lambda: byte_bpe(splits(r"\p{N}{1,3}", r"[一-龥\x{3040}-ゟ゠-ヿ]+", DEEPSEEK3)),
    "falcon": lambda: byte_bpe(
        P.Sequence(
            [
                P.Punctuation("contiguous"),
                byte_level(),
                P.Digits(False),
                P.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
            ]
        )
    ),
    "possessive": lambda: byte_bpe(splits(POSSESSIVE)),
    "han": lambda: byte_bpe(splits(HAN)),
    "missing-bytes": lambda: byte_bpe(byte_level(), size=200, alphabet=False),
    "missing-bytes-unknown": lambda: byte_bpe(
        byte_level(), size=200, alphabet=False, unk_token="<unk>"
    ),
    "missing-bytes-fused": lambda: byte_bpe(
        byte_level(), size=200, alphabet=False, unk_token="<unk>", fuse_unk=True
    ),
    "spm-bpe": lambda: framed(
        byte_fallback_bpe(N.Sequence([N.Prepend("▁"), N.Replace(" ", "▁")]), None, spm_decoder),
        ["<s>"],
    ),
    "gemma-bpe": lambda: byte_fallback_bpe(
        N.Replace(" ", "▁"), P.Split(" ", "merged_with_previous"), gemma_decoder
    ),
    "metaspace-first": lambda: byte_fallback_bpe(
        None, P.Metaspace("▁", "first", False), spm_decoder
    ),
    "unigram": lambda: unigram(P.Metaspace("▁", "always", True), spm_decoder, True),
    "unigram-unknown": lambda: with_added(
        unigram(
            P.Metaspace("▁", "first", True),
            decoders.Metaspace("▁", "never"),
            False,
            N.Sequence([N.NFKC(), N.Lowercase(), N.Replace(Regex(" {2,}"), " ")]),
        )
    ),
    "every-normalizer": lambda: with_added(
        byte_bpe(
            P.Sequence([P.WhitespaceSplit(), P.Punctuation("isolated"), byte_level()]),
            normalizer=N.Sequence(
                [
                    N.Strip(True, True),
                    N.NFKD(),
                    N.StripAccents(),
                    N.Lowercase(),
                    N.Replace(Regex(r"\s+"), " "),
                ]
            ),
        )
    ),
    "words": lambda: byte_bpe(
        P.Sequence(
            [
                P.Whitespace(),
                P.Split(Regex("[aeiou]"), "merged_with_previous"),
                P.Split(Regex("[xyz]"), "merged_with_next"),
                P.Split("th", "contiguous"),
                byte_level(False),
            ]
        )
    ),
}


def main() -> None:
    OUT.mkdir(exist_ok=True)
    (OUT / "strings.json").write_text(
        json.dumps(STRINGS, ensure_ascii=True, separators=(",", ":")) + "\n"
    )
    for name, build in TOKENIZERS.items():
        file = OUT / f"{name}.json"
        kept = file.exists() and "--train" not in sys.argv
        tokenizer = (
            Tokenizer.from_str(json.dumps(json.loads(file.read_text())["tokenizer"]))
            if kept
            else build()
        )
        ids = lambda special: [tokenizer.encode(s, add_special_tokens=special).ids for s in STRINGS]
        tokenizer.encode_special_tokens = True
        plain = ids(False)
        tokenizer.encode_special_tokens = False
        parsed = ids(True)
        decoded = [tokenizer.decode(one, skip_special_tokens=True) for one in parsed]
        # Decoding mostly gives the text back: only what differs is written.
        changed = {i: d for i, (s, d) in enumerate(zip(STRINGS, decoded)) if s != d}
        golden = {
            "tokenizer": json.loads(tokenizer.to_str()),
            "plain": plain,
            "parsed": {i: p for i, (a, p) in enumerate(zip(plain, parsed)) if a != p},
            "decoded": changed,
        }
        file.write_text(json.dumps(golden, ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
