"""Text for the tokenizer goldens: what the small vocabularies learn from, and what they encode."""

import random

CORPUS = """
The kernel hands out pages on demand, and the engine hands out tokens. Don't count what isn't there:
it's the page that's resident, we've measured it, they'll see, I'm sure, you'd better look, we're done.
A request arrives at 10:45 with 1024 tokens; 2048 more come at 11:00. HTTPServer, camelCase, snake_case,
SCREAMING_CASE, x = y + 42 * (z - 7) / 3.14159; if (a != b) { return [1, 2, 3]; } // comment #42
    indented by four, then	by a tab
        and by eight.  Two spaces.   Three spaces.

Überall lernen Maschinen Straße für Straße; naïve façades, Ærøskøbing, Łódź, İstanbul, ΣΊΣΥΦΟΣ σίσυφος.
Быстрая коричневая лиса прыгает через ленивую собаку. Швидка лисиця стрибає.
敏捷的棕色狐狸跳过了懒狗。素早い茶色の狐がのろまな犬を飛び越える。カタカナとひらがな。
빠른 갈색 여우가 게으른 개를 뛰어넘는다. الثعلب البني السريع يقفز فوق الكلب الكسول. השועל החום המהיר קפץ.
तेज़ भूरी लोमड़ी आलसी कुत्ते के ऊपर कूदती है। สุนัขจิ้งจอกสีน้ำตาลกระโดดข้ามสุนัขขี้เกียจ
"Quoted," she said — then… nothing! (Really?) [yes] {no} <tag attr="v"> & more; 50% off, $19.99, €5, £3.
https://example.org/path/to?query=1&other=two#fragment user@example.org 192.168.0.1 0xDEADBEEF
""" * 3

NASTY = [
    "", " ", "  ", "   ", "\n", "\n\n", "\n\n\n", "\t", "\t\t \t", "\r\n", "\r\n\r\n", "\r", " \n", "\n ", " \n \n ",
    "a", " a", "  a", "   a", "a ", "a  ", "a   b", "a\nb", "a\n\nb", "a \n b", "a\r\nb", "a\tb", "    indented\n        more\n",
    "Hello world", "hello, world!", "HELLO WORLD", "Hello  world  ", "Hello\u00a0world", "a\u0085b", "a\u2028b\u2029c", "a\u3000b",
    "\ufeffbom", "zero\u200bwidth", "soft\u00adhyphen", "\u0000", "a\u0000b", "\u0001\u0002\u007f\u0080", "\u001b[31mred\u001b[0m",
    "it's we're I'm you'll they've he'd don't", "IT'S WE'RE I'M YOU'LL THEY'VE HE'D DON'T", "It'S wE'Re", "'s 's'S'ſ'll'LL'Ll", "x\u2019s",
    "'\u017f \u017fs \u212a", "''s", "can't've", "'tis 'twas", "rock 'n' roll",
    "0", "1", "12", "123", "1234", "12345", "1234567890", "3.14159", "1,000,000", "１２３", "²³¹", "½¾", "Ⅷ", "٣٤٥", "𝟙𝟚𝟛", "1a2b3c", "a1", "1st 2nd",
    "e\u0301", "é", "A\u030a", "Å", "\u212b", "o\u0302\u0323", "\u0301", "a\u0300\u0301\u0302", "ﬁ ﬂ ﬆ", "ǅ ǆ Ǆ", "ª º", "ŉ", "ß ẞ", "İ ı", "ΣΑΣ Σ.", "\uac00 \u1100\u1161",
    "中文", "中文 english 中文", "日本語のテキスト", "カタカナ", "한국어 텍스트", "العربية نص", "עברית טקסט", "हिन्दी पाठ", "ข้อความไทย", "ខ្មែរ", "русский текст", "Ελληνικά",
    "\u202eRTL\u202c mark", "שלום world שלום", "豈 𠀀 𪛟", "。、！？「」", "《书》—“引”",
    "😀", "😀😀", "👍🏽", "👨\u200d👩\u200d👧\u200d👦", "🏳\ufe0f\u200d🌈", "🇩🇪🇫🇷", "1\ufe0f\u20e3", "❤\ufe0f", "a😀b", " 😀 ", "\U0010ffff", "\ue000", "\ufffd", "\ufffe",
    "!!!", "...", "…", "?!", "----", "____", "====", "<>", "<|", "|>", "</", "{{}}", "[[", "$$", "a_b", "a-b", "a.b", "a/b", "//", "/*", "/**/\n", "#\n", "x=1\n", "!\n\n", ")\n", "path/\n/x",
    "http://x.y/z?q=1&r=2", "user@example.org", "0xDEADBEEF", "camelCase HTTPServer XMLHttpRequest", "McDonald ÀÉ Àé éÀ", "aBCd", "ABc", "ǅa", "Страна СССР ссср",
    "<s>", "</s>", "<unk>", "<0x0A>", "<0xFF>", "▁", "▁▁", "▁a", "a▁b", " ▁", "Ġ", "Ċ", "Ã©",
    "<|end|>", "a<|end|>b", " <|end|> ", "<|end|><|end|>", "<|end|", "<|end|>>", "<|e<|end|>", "x <|end|>\n",
    "<pad>", " <pad> x", "x\t<pad>\n y", "<pad> <pad>", "[W]  <pad>", "<|long|>  <pad>", "[W]", "a[W]", "[W]b", "a [W] b", "_[W]_", "é[W]", "![W]!", "NORM", "norm", "xNORMx", " NORM ", "long token", "a long token b", "<|long|>", "<|long|>er",
    "a" * 33, "a" * 70, "ab" * 40, " " * 33 + "x", "\n" * 35, "中" * 40, "=" * 50, "  \n" * 12, "\t" * 20 + "x", "😀" * 20, "1" * 40, "aA" * 20, "\u0301" * 12,
    "def f(x):\n    return x ** 2  # square\n\n\nclass A:\n\tpass\n", "| a | b |\n|---|---|\n", "  trailing  \n  lines  \n", "mixed 中文 and हिन्दी, 42% of 😀!", "The quick brown fox", "the the the",
]


def fuzz(seed: int, count: int) -> list[str]:
    """Random joins of nasty strings and of characters from many blocks."""
    rng = random.Random(seed)
    blocks = [(0x20, 0x7E), (0xA0, 0x17F), (0x300, 0x36F), (0x370, 0x4FF), (0x590, 0x6FF), (0x900, 0x97F),
              (0x2000, 0x206F), (0x3040, 0x30FF), (0x4E00, 0x4EFF), (0xAC00, 0xACFF), (0xFF00, 0xFFEF), (0x1F600, 0x1F64F)]
    out = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randint(1, 4)):
            if rng.random() < 0.7:
                parts.append(rng.choice(NASTY))
            else:
                low, high = rng.choice(blocks)
                parts.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 4))))
        out.append("".join(parts)[:60])
    return out


STRINGS = NASTY + fuzz(20, 90)
