"""Writes src/text/goldens/models/smollm2-135m-instruct.json: how Hugging Face's tokenizers library
encodes with the default model's vocabulary, which it takes from the GGUF file.

Run: python tools/goldens/text_smollm2.py MODEL.gguf
(needs: pip install tokenizers gguf jinja2 transformers)
"""

import json
import pathlib
import random
import sys

from gguf import GGUFReader
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers.utils.chat_template_utils import _compile_jinja_template

from text_corpus import CORPUS, STRINGS, fuzz

OUT = pathlib.Path(__file__).parents[2] / "src/text/goldens/models/smollm2-135m-instruct.json"
MARKS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<repo_name>",
    "<|im_",
    "|>",
    " ",
    "\n",
    "assistant",
    "hello 42",
]
MESSAGES = [
    {"role": "user", "content": "What's the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "Und Deutschland? 🇩🇪"},
]


def main() -> None:
    fields = GGUFReader(sys.argv[1]).fields
    value = lambda key: fields[f"tokenizer.{key}"].contents()
    tokens, kinds = value("ggml.tokens"), value("ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in value("ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False) for t, kind in zip(tokens, kinds) if kind == 3]
    )

    rng = random.Random(7)
    marked = ["".join(rng.choice(MARKS) for _ in range(rng.randint(2, 6))) for _ in range(30)]
    strings = [*marked, *fuzz(11, 120), *CORPUS.split("\n")[:22]]
    template = _compile_jinja_template(value("chat_template"))
    chat = template.render(messages=MESSAGES, add_generation_prompt=True, tools=None)

    def ids(texts, special):
        tokenizer.encode_special_tokens = not special
        return [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]

    golden = {
        "strings": strings,
        "plain": ids(strings, False),
        "parsed": ids(strings, True),
        "nasty": ids(STRINGS, False),
        "messages": MESSAGES,
        "chat": chat,
        "chatIds": ids([chat], True)[0],
    }
    OUT.parent.mkdir(exist_ok=True, parents=True)
    OUT.write_text(json.dumps(golden, ensure_ascii=True, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
