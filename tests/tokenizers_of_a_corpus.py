"""What tests of tokenizers share: a corpus, hard texts, and tokenizers of every kind learned from it."""

from __future__ import annotations

from fastgpt.text.tokenizer import SymbolTokenizer, train_byte_pairs

CORPUS = [
    "def forward(self, x):\n    return self.norm(x + self.attention(x))\n\n\nclass Model:\n    pass\n" * 4,
    "It's the first time they've seen that; we'll say 1234 things, and naïve cafés don't matter.  Über 🙂🙂 alles!\n"
    * 4,
    "日本語のテキスト、日本語のモデル。\t\t\r\n   the end of the line   \n" * 4,
]
HARD = [
    *(
        "",
        " ",
        "\n",
        "\n\n \n",
        "a  b",
        "  \t x\n\n y ",
        "It's we'll THEY'VE",
        "1234567890",
        "日本語",
        "naïve",
        "\u0301e\u0301",
    ),
    *(
        "🙂👩‍👩‍👧🇳🇴",
        "\x00\x1f\x7f",
        "\u00a0\u2003\u2028x",
        "<|endoftext|>",
        "a<|endoftext|>b",
        "#!?...",
        "\ufffd\ufeff",
    ),
]
BYTES = {bytes([b]): b for b in range(256)}
PAIRS = train_byte_pairs(CORPUS, 400)
CHARS = SymbolTokenizer.from_text("char", "".join(CORPUS))
WORDS = SymbolTokenizer.from_text("word", "".join(CORPUS))
