"""Detection (Bills et al. 2023; Paulo et al. 2024, arXiv:2410.13928): is the feature active in this text?"""

from __future__ import annotations

from crosslayer.autointerp.explain import DATA
from crosslayer.autointerp.quote import quoted
from crosslayer.autointerp.scores.judging import ANSWER, ANY, Judging

SYSTEM = f"""You check what is said of a feature of a language model: a detector that fires on some tokens of a text.
{DATA}
"feature" says what it fires on. For each of "texts": does it hold a token that such a feature fires on?
{ANY}
{ANSWER}"""

DETECTION = Judging(
    name="detection",
    system=SYSTEM,
    show=lambda window: quoted("".join(window.tokens)),
    sees="text",
)
