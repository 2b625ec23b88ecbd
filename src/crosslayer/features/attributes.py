"""Attributes of tokens and their positions, in which label rules are written.

An *attribute* gives each token of a sample one integer value: the token itself, the token before it, its position in
the document, its kind, the bracket or the line that contains it. A rule lists the values of one attribute on which a
feature fires. No torch.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_NAMED = 3
"""Number of a rule's values that its label names."""
BRACKETS = {"(": ")", "[": "]", "{": "}"}
KINDS = (
    "special tokens",
    "line breaks",
    "indentation",
    "spaces",
    "numbers",
    "opening brackets",
    "closing brackets",
    "quotes",
    "operators",
    "punctuation",
    "lower-case words",
    "capitalised words",
    "upper-case words",
    "words with capitals inside",
    "pieces inside words",
    "pieces inside words, capitalised",
    "letters of other scripts",
    "mixed",
)
BUCKETS = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Last positions of the position classes in a document."""


class Attribute(NamedTuple):
    """Values of all tokens of a sample, and labels for sets of values.

    Attributes:
        name: name of the kind of rule.
        value: value per token, -1 for none.
        key: the token id, or one id per token of an n-gram, that a bundle stores for a value.
        say: builds a label from some of the values, the most distinctive first.
    """

    name: str
    value: NDArray
    key: Callable[[int], Any]
    say: Callable[[Sequence[int]], str]


class Vocabulary:
    """Classes of a tokenizer's tokens, derived from their strings.

    Attributes:
        strings: token strings.
        kind_V, script_V: indices into `KINDS` and `scripts`.
    """

    def __init__(self, strings: Sequence[str], special: Sequence[int] = ()) -> None:
        self.strings = list(strings)
        scripts = [_script(s) for s in strings]
        self.scripts = sorted(set(scripts))
        number = {name: i for i, name in enumerate(self.scripts)}
        self.script_V = np.array([number[s] for s in scripts], np.int32)
        self.kind_V = np.array([KINDS.index(_kind(s)) for s in strings], np.int32)
        self.special_V = np.zeros(len(self.strings), bool)
        self.special_V[list(special)] = True
        self.kind_V[self.special_V] = 0

    def quoted(self, token: int) -> str:
        """Return a token's string in quotes, with line breaks and tabs made visible."""
        return quoted(self.strings[token])


def quoted(text: str) -> str:
    """Return the text in curly quotes, which are rare inside tokens, with line breaks and tabs made visible."""
    shown = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    return f"“{shown}”"


def _script(text: str) -> str:
    """Return the script of the first letter, from its Unicode name."""
    for c in text:
        if c.isalpha():
            return unicodedata.name(c, "UNKNOWN").split()[0].capitalize()
    return "none"


def _kind(text: str) -> str:
    bare = text.strip(" ")
    if "\n" in text and not text.strip():
        return "line breaks"
    if not bare.strip():
        return "indentation" if len(text) > 1 or "\t" in text else "spaces"
    bare = bare.strip()
    if bare.isdigit():
        return "numbers"
    if bare.isalpha() and bare.isascii():
        if not text.startswith((" ", "\n", "\t")) and len(text) == len(bare):
            return "pieces inside words, capitalised" if bare[0].isupper() else "pieces inside words"
        if bare.islower():
            return "lower-case words"
        if bare.isupper() and len(bare) > 1:
            return "upper-case words"
        return "capitalised words" if bare.istitle() else "words with capitals inside"
    if any(c.isalpha() and not c.isascii() for c in bare):
        return "letters of other scripts"
    if not any(c.isalnum() or c == "_" for c in bare):
        if any(c in "([{" for c in bare):
            return "opening brackets"
        if any(c in ")]}" for c in bare):
            return "closing brackets"
        if any(c in "'\"`" for c in bare):
            return "quotes"
        return "operators" if any(c in "=+-*/<>%&|^~!@" for c in bare) else "punctuation"
    return "mixed"


class Places(NamedTuple):
    """Positional context of each token of some rows, (rows, T)."""

    in_document: NDArray
    """Tokens since the special token that starts the document, or since the start of the row."""
    indent: NDArray
    """Spaces before the first word of the line; -1 where the row starts inside the line."""
    head: NDArray
    """The token of the line's first word; -1 before it and where the row starts inside the line."""
    bracket: NDArray
    """0 outside brackets, else 1 + the index in `([{` of the innermost open bracket."""


def places_of(rows_BT: NDArray, vocabulary: Vocabulary) -> Places:
    """Track lines and brackets through each row."""
    effects = [_effect(s) for s in vocabulary.strings]
    special = vocabulary.special_V.tolist()
    shape = rows_BT.shape
    in_document, indent, head, bracket = (np.empty(shape, np.int32) for _ in range(4))
    for r, row in enumerate(rows_BT.tolist()):
        since, spaces, first, stack = 0, -1, -1, list[int]()
        in_line = True
        a, b, c, d = [], [], [], []
        for token in row:
            if special[token]:
                since, spaces, first, stack, in_line = 0, 0, -1, [], False
            else:
                since += 1
                broke, after, word, brackets = effects[token]
                if broke:
                    spaces, first, in_line = after, -1, False
                elif not in_line and first < 0 and not word:
                    spaces += after
                if word and not in_line:
                    first, in_line = token, True
                for x in brackets:
                    if x > 0:
                        stack.append(x)
                    elif stack:
                        stack.pop()
            a.append(since)
            b.append(spaces)
            c.append(first)
            d.append(stack[-1] if stack else 0)
        in_document[r], indent[r], head[r], bracket[r] = a, b, c, d
    return Places(in_document, indent, head, bracket)


def _effect(text: str) -> tuple[bool, int, bool, tuple[int, ...]]:
    """Return how a token changes the line and the brackets.

    The result holds whether the token breaks the line, the spaces after the break or in all, whether it has a word, and
    the brackets that it opens and closes.
    """
    tail = text.rpartition("\n")[2]
    spaces = len(tail.replace("\t", "    ")) - len(tail.replace("\t", "    ").lstrip(" "))
    brackets = [1 + "([{".index(c) if c in "([{" else -1 for c in text if c in "([{)]}"]
    return "\n" in text, spaces, bool(tail.strip()), tuple(brackets)


def attributes_of(position: NDArray, rows_BT: NDArray, vocabulary: Vocabulary) -> list[Attribute]:
    """Compute the attributes of the tokens at these positions of the token file.

    Args:
        rows_BT: all rows of the token file.
    """
    context = rows_BT.shape[1]
    row, at = position // context, position % context
    used, row = np.unique(row, return_inverse=True)
    rows = np.asarray(rows_BT[used]).astype(np.int64)
    places = places_of(rows, vocabulary)
    n, strings = len(vocabulary.strings), vocabulary.strings

    def back(by: int) -> NDArray:
        ids = rows[row, np.maximum(at - by, 0)]
        return np.where(at >= by, ids, -1)

    def set_of(texts: Callable[[int], str], template: str = "{}", or_: str = ", ") -> Callable[[Sequence[int]], str]:
        def say(values: Sequence[int]) -> str:
            more = f" (+{len(values) - MAX_NAMED})" if len(values) > MAX_NAMED else ""
            return template.format(or_.join(texts(v) for v in values[:MAX_NAMED]) + more)

        return say

    def plain(name: str, value: NDArray, say: Callable[[Sequence[int]], str]) -> Attribute:
        return Attribute(name, value, lambda v: v, say)

    def ngram(name: str, steps: Sequence[int], template: str) -> Attribute:
        columns = [back(by) for by in steps]
        key = columns[0]
        known = columns[0] >= 0
        for column in columns[1:]:
            # Renumber at each step, so that the product with the vocabulary size never overflows.
            key = np.unique(key, return_inverse=True)[1] * n + column
            known &= column >= 0
        distinct, first, value = np.unique(key, return_index=True, return_inverse=True)
        del distinct
        ids = np.stack([c[first] for c in columns], axis=1)
        texts = lambda v: quoted("".join(strings[t] for t in ids[v]))  # noqa: E731
        return Attribute(name, np.where(known, value, -1), lambda v: ids[v].tolist(), set_of(texts, template))

    since = places.in_document[row, at]
    bucket = np.where(since > 0, np.searchsorted(BUCKETS, since), -1)
    return [
        plain("token", back(0), set_of(vocabulary.quoted)),
        plain("previous token", back(1), set_of(vocabulary.quoted, "after {}")),
        ngram("n-gram", (1, 0), "{}"),
        ngram("n-gram of three", (2, 1, 0), "{}"),
        plain("kind", vocabulary.kind_V[back(0)], set_of(lambda v: KINDS[v])),
        plain("script", vocabulary.script_V[back(0)], set_of(lambda v: f"{vocabulary.scripts[v]} script")),
        plain("position", bucket, lambda values: _positions(values)),
        plain("indentation", places.indent[row, at], set_of(str, "lines indented by {}", ", ")),
        plain("brackets", places.bracket[row, at], set_of(_inside, or_=" or ")),
        plain("line", places.head[row, at], set_of(vocabulary.quoted, "lines that begin with {}")),
    ]


def next_tokens(position: NDArray, rows_BT: NDArray) -> NDArray:
    """Return the token after each position; -1 at the end of a row."""
    context = rows_BT.shape[1]
    flat = rows_BT.reshape(-1)
    following = flat[np.minimum(position + 1, flat.size - 1)].astype(np.int64)
    return np.where(position % context < context - 1, following, -1)


def _inside(value: int) -> str:
    if not value:
        return "outside brackets"
    opening = "([{"[value - 1]
    return f"inside {opening}…{BRACKETS[opening]}"


def _positions(values: Sequence[int]) -> str:
    """Format as `positions 1–3 of a document`, with neighbouring classes joined."""
    spans: list[list[int]] = []
    for v in sorted(values):
        low, high = (BUCKETS[v - 1] + 1 if v else 1), (BUCKETS[v] if v < len(BUCKETS) else -1)
        if spans and spans[-1][1] + 1 == low:
            spans[-1][1] = high
        else:
            spans.append([low, high])
    said = [f"{a}" if a == b else f"from {a} on" if b < 0 else f"{a}–{b}" for a, b in spans]
    return f"position{'s' if said != ['1'] else ''} {', '.join(said)} of a document"
