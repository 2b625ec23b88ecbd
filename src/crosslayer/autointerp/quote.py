"""Quote untrusted text in a prompt, so that it can be read but not act as instructions or structure.

Every text is a JSON string. Characters that a chat template, a tokenizer or our own marks could take for structure are
written as JSON escapes (`\\u003c`), which have the same meaning in JSON: `<` and `[` where they start something like
`<|im_end|>`, `</s>` or `[INST]`, the marks « and », and all invisible characters.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Collection, Sequence

OPEN, CLOSE = "«", "»"
"""Marks around tokens on which a feature fires. Nothing else in a prompt contains them."""
_STRUCTURE = re.compile(r"<(?=[|｜/!_A-Za-z▁])|(?<=[|｜])>|\[(?=/?[A-Z_]{2,}\])|[«»]")
_UNSEEN = ("Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp")


def quoted(text: str) -> str:
    """Encode a text as a JSON string, including its quotation marks."""
    return f'"{_inside(text)}"'


def _inside(text: str) -> str:
    written = json.dumps(text, ensure_ascii=False)[1:-1]
    return "".join(_escaped(c) for c in _STRUCTURE.sub(lambda m: _code(m[0]), written))


def _escaped(c: str) -> str:
    return _code(c) if not c.isascii() and unicodedata.category(c) in _UNSEEN else c


def _code(c: str) -> str:
    return f"\\u{ord(c):04x}" if ord(c) < 0x10000 else json.dumps(c)[1:-1]


def marked(tokens: Sequence[str], marks: Collection[int]) -> str:
    """Encode tokens as a JSON string, with « and » around the runs of tokens at `marks`."""
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
    """Format JSON values as one object, numbered from 1, one per line."""
    return "{" + ",\n ".join(f'"{n}": {item}' for n, item in enumerate(items, 1)) + "}"
