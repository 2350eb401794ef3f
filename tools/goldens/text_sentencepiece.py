"""Writes src/text/goldens/gguf-*.json: SentencePiece models as GGUF metadata carries them, and how
the sentencepiece library itself encodes the nasty strings.

Run: python tools/goldens/text_sentencepiece.py      (needs: pip install sentencepiece)
"""

import io
import json
import pathlib

import sentencepiece as spm

from text_corpus import CORPUS, STRINGS

OUT = pathlib.Path(__file__).parents[2] / "src/text/goldens"
USER = ["\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "<|long|>", "\t", "<|lo"]

# name -> dummy prefix, byte fallback, user-defined symbols
MODELS = {
    "gguf-llama": (True, True, []),
    "gguf-gemma": (False, True, USER),
    "gguf-unknown": (False, False, []),
}


def kind(sp, i, user):
    for flag, value in ((sp.is_unknown, 2), (sp.is_control, 3), (sp.is_unused, 5), (sp.is_byte, 6)):
        if flag(i):
            return value
    return 4 if sp.id_to_piece(i) in user else 1


def main() -> None:
    for name, (prefix, fallback, user) in MODELS.items():
        model = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS.split("\n")),
            model_writer=model,
            model_type="bpe",
            minloglevel=2,
            vocab_size=640 if fallback else 340,
            byte_fallback=fallback,
            add_dummy_prefix=prefix,
            character_coverage=0.98,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            user_defined_symbols=user,
        )
        sp = spm.SentencePieceProcessor(model_proto=model.getvalue())
        kinds = [kind(sp, i, user) for i in range(sp.vocab_size())]
        # Converters write user-defined symbols with plain spaces.
        tokens = [
            sp.id_to_piece(i).replace("▁", " ") if kinds[i] == 4 else sp.id_to_piece(i)
            for i in range(sp.vocab_size())
        ]
        golden = {
            "tokens": tokens,
            "scores": [sp.get_score(i) for i in range(sp.vocab_size())],
            "kinds": kinds,
            "prefix": prefix,
            "plain": [sp.encode(s) for s in STRINGS],
            "decoded": {i: d for i, s in enumerate(STRINGS) if (d := sp.decode(sp.encode(s))) != s},
        }
        (OUT / f"{name}.json").write_text(
            json.dumps(golden, ensure_ascii=False, separators=(",", ":")) + "\n"
        )


if __name__ == "__main__":
    main()
