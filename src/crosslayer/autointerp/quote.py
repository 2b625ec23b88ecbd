"""Text of others inside a prompt: it can be read, and cannot act.

Every stretch of text is a JSON string. Characters that a chat template, a tokenizer or our own marks could take for
structure are written as JSON escapes (`\\u003c`), which say the same to whoever reads JSON: `<` and `[` where they open
something like `<|im_end|>`, `</s>` or `[INST]`, the marks « and », and all that cannot be seen.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Sequence

OPEN, CLOSE = "«", "»"
"""Around tokens on which a feature fires. In a prompt they come from nowhere else."""
_STRUCTURE = re.compile(r"<(?=[|｜/!_A-Za-z▁])|(?<=[|｜])>|\[(?=/?[A-Z_]{2,}\])|[«»]")
_UNSEEN = ("Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp")


def quoted(text: str) -> str:
    """A JSON string of the text, its quotation marks included."""
    return f'"{_inside(text)}"'


def _inside(text: str) -> str:
    written = json.dumps(text, ensure_ascii=False)[1:-1]
    return "".join(_escaped(c) for c in _STRUCTURE.sub(lambda m: _code(m[0]), written))


def _escaped(c: str) -> str:
    return _code(c) if not c.isascii() and unicodedata.category(c) in _UNSEEN else c


def _code(c: str) -> str:
    return f"\\u{ord(c):04x}" if ord(c) < 0x10000 else json.dumps(c)[1:-1]


def marked(tokens: Sequence[str], marks: Collection[int]) -> str:
    """A JSON string of the tokens, those at `marks` between « and », runs of them together."""
    parts, at = list[str](), 0
    while at < len(tokens):
        end = at + 1
        while end < len(tokens) and (end in marks) == (at in marks):
            end += 1
        piece = _inside("".join(tokens[at:end]))
        parts.append(f"{OPEN}{piece}{CLOSE}" if at in marks else piece)
        at = end
    return f'"{"".join(parts)}"'


def numbered(items: Sequence[str]) -> str:
    """JSON values as one object, by number from 1, a line each."""
    return "{" + ",\n ".join(f'"{n}": {item}' for n, item in enumerate(items, 1)) + "}"
