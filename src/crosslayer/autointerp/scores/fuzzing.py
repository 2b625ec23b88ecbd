"""Fuzzing (Paulo et al. 2024, arXiv:2410.13928): is the feature active on the marked tokens?"""

from __future__ import annotations

from crosslayer.autointerp.explain import DATA
from crosslayer.autointerp.quote import CLOSE, OPEN, marked
from crosslayer.autointerp.scores.judging import ANSWER, ANY, Judging

SYSTEM = f"""You check what is said of a feature of a language model: a detector that fires on some tokens of a text.
{DATA}
"feature" says what it fires on. In each of "texts" some tokens stand between {OPEN} and {CLOSE}: are these the \
tokens that such a feature fires on?
{ANY}
{ANSWER}"""

FUZZING = Judging(
    name="fuzzing",
    system=SYSTEM,
    show=lambda window: marked(window.tokens, set(window.active)),
    sees="marks",
)
