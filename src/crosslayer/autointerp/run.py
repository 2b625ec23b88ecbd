"""A run: explain, score, keep, some features at a time.

A label is kept as soon as it is there, its scores when they are. All that was answered is in the cache, so a run that
was stopped, however, is run again by the same command: it goes through the same questions, asks those that have no
answer, and ends the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

from crosslayer.autointerp.ask import Asker, Failure, OverBudget, Usable
from crosslayer.autointerp.choose import NAMELESS
from crosslayer.autointerp.documents import Documents, in_drawn_order
from crosslayer.autointerp.endpoint import Answer, Request
from crosslayer.autointerp.estimate import Prices
from crosslayer.autointerp.examples import Material, material
from crosslayer.autointerp.explain import PROMPT_VERSION, explain_request
from crosslayer.autointerp.groups import group_request, groups_of
from crosslayer.autointerp.reply import Explanation, explanation_in
from crosslayer.autointerp.scores import Question, Score, chosen
from crosslayer.autointerp.settings import LabelSettings
from crosslayer.autointerp.summary import Tally, summary
from crosslayer.bundles.annotations import PERSON, GroupLabel, Label
from crosslayer.bundles.bundle import FeatureBundle
from crosslayer.core.errors import ConfigError
from crosslayer.core.progress import Update

AT_ONCE = 64
"""Features explained before the first of them is scored; labels are shuffled among them."""
VIEW = "labelling"
"""The kind under which a run's summary is kept in `user.sqlite`, by the model's name."""

Parse = Callable[[Answer], Any]


class _Job(NamedTuple):
    """A question about a feature, and about whose label it is."""

    feature: int
    whose: str
    score: Score
    question: Question


class Labelling:
    """Labels features of a bundle with what a model says.

    Args:
        concurrency: requests at once.

    Raises:
        ConfigError: for a model whose name is that of another source of labels, and a score that is not known.
    """

    def __init__(self, bundle: FeatureBundle, asker: Asker, settings: LabelSettings, *, concurrency: int = 8) -> None:
        self.source = asker.endpoint.model
        if self.source.strip().lower() in (PERSON, "rule", ""):
            raise ConfigError(
                f"--model {self.source!r} cannot be told from labels by {self.source or 'nobody'}; serve it under"
                " another name"
            )
        self.bundle, self.asker, self.settings, self.concurrency = bundle, asker, settings, concurrency
        self.scores = chosen(settings)
        self.documents = Documents(bundle)
        self.tally = Tally()
        self._over_budget = False

    @property
    def provenance(self) -> dict[str, Any]:
        """Of each label: who said it, asked what, shown what."""
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.settings).items()}
        settings["methods"] = [score.name for score in self.scores]
        return {
            "model": self.source,
            "endpoint": self.asker.endpoint.host,
            "prompt_version": PROMPT_VERSION,
            "documents": self.documents.told,
            "settings": settings,
            "crosslayer": version("crosslayer"),
        }

    def run(
        self,
        features: Sequence[int],
        *,
        groups: bool = True,
        prices: Prices | None = None,
        on_progress: Update = lambda done, figures="": None,
    ) -> dict[str, Any]:
        """Label and score the features, and name the groups that they are in; gives the summary, and keeps it.

        Args:
            on_progress: told the share that is done.

        Raises:
            EndpointError: where the endpoint answers nothing at all. What was answered is kept.
        """
        began = time.monotonic()
        n_parts = -(-len(features) // AT_ONCE)
        for part in range(n_parts):
            # Parts of one size, so that the last is not too small to shuffle labels in.
            at, end = (len(features) * i // n_parts for i in (part, part + 1))
            some = features[at:end]
            if self._over_budget:
                self.tally.unasked += len(some)
                continue
            self._some(some, partial(_share, on_progress, self._figures, at, len(some), len(features)))
        if groups and not self._over_budget:
            self._groups(features)
        found = summary(
            self.tally,
            self.asker.spent,
            source=self.source,
            endpoint=self.asker.endpoint.host,
            n_chosen=len(features),
            wall_s=time.monotonic() - began,
            prices=prices,
            provenance=self.provenance,
        )
        self.bundle.user.save_view(VIEW, self.source, found)
        return found

    def _figures(self) -> str:
        spent = self.asker.spent
        return f"{self.tally.labelled:,} labelled, {spent.calls:,} calls, {spent.tokens:,} tokens"

    def _some(self, features: Sequence[int], on_progress: Callable[[float], None]) -> None:
        materials = {f: material(self.bundle, self.documents, f, self.settings) for f in features}
        shown = [m for m in materials.values() if m.shown]
        self.tally.no_examples += len(features) - len(shown)
        labels = self._explain(shown, on_progress)
        said = self._said({f: label for f, (label, _) in labels.items()})
        jobs = self._jobs([materials[f] for f in labels], said)
        answers = self._ask([self._question(j, said) for j in jobs], lambda share: on_progress(0.1 + 0.9 * share))
        by_feature: dict[int, list[tuple[_Job, Any]]] = {f: [] for f in labels}
        for job, answer in zip(jobs, answers, strict=True):
            by_feature[job.feature].append((job, answer))
        for f, asked in by_feature.items():
            if any(answer is None for _, answer in asked):
                self.tally.unreached += 1
            elif not asked:
                self.tally.unscored += 1
            else:
                scores = _collated(materials[f], asked)
                self.tally.scores[f] = scores
                self._keep(f, labels[f], scores)

    def _explain(
        self, shown: Sequence[Material], on_progress: Callable[[float], None]
    ) -> dict[int, tuple[Explanation, Answer]]:
        """What is said of each feature; those labels are kept at once."""
        requests = [
            explain_request(m.shown, m.contrast, self._promoted(m.feature), self.settings.thinking) for m in shown
        ]
        found: dict[int, tuple[Explanation, Answer]] = {}
        for m, answer in zip(
            shown, self._ask([(r, explanation_in) for r in requests], lambda s: on_progress(0.1 * s)), strict=True
        ):
            match answer:
                case Usable(said, raw):
                    found[m.feature] = (said, raw)
                    self._keep(m.feature, found[m.feature], None)
                    self.tally.labelled += 1
                case Failure():
                    self.tally.failed += 1
                case _:
                    self.tally.unasked += 1
        return found

    def _promoted(self, feature: int) -> list[str]:
        if not self.bundle.has("top_id"):
            return []
        return [self.bundle.text(t) for t in self.bundle.at("top_id", feature).tolist() if t >= 0]

    def _keep(self, feature: int, said: tuple[Explanation, Answer], scores: dict[str, Any] | None) -> None:
        """Write a label; without scores only if it is new, so that those of the same label stay until there are
        others.
        """
        label, answer = said
        if scores is None:
            kept = next(
                (x for x in self.bundle.user.labels([feature]).get(feature, []) if x.source == self.source), None
            )
            if kept is not None and (kept.label, kept.explanation) == label:
                return
        provenance = self.provenance | {"time": answer.time}
        self.bundle.user.set_label(
            Label(feature, self.source, label.label, label.explanation, scores, provenance, answer.time)
        )

    def _said(self, labels: dict[int, Explanation]) -> dict[int, dict[str, Explanation]]:
        """What is to be judged of each feature: its label, another feature's that differs, and the rule's, as far as
        there are any.
        """
        others = in_drawn_order(labels, self.settings.seed, "shuffled")
        found: dict[int, dict[str, Explanation]] = {}
        for at, f in enumerate(others):
            found[f] = {"label": labels[f]}
            turned = (labels[g] for g in others[at + 1 :] + others[:at])
            other = next((x for x in turned if x.label.casefold() != labels[f].label.casefold()), None)
            if "shuffled" in self.settings.baselines and other is not None:
                found[f]["shuffled"] = other
            row = self.bundle.index.row(f)
            if "rule" in self.settings.baselines and row.label and row.rule not in NAMELESS:
                found[f]["rule"] = Explanation(row.label, "")
        return found

    def _jobs(self, materials: Sequence[Material], said: dict[int, dict[str, Explanation]]) -> list[_Job]:
        """All questions that score some features."""
        return [
            _Job(m.feature, who, score, question)
            for m in materials
            for score in self.scores
            for question in score.questions(m, self.settings)
            for who in (said[m.feature] if score.of_label else ("label",))
        ]

    def _question(self, job: _Job, said: dict[int, dict[str, Explanation]]) -> tuple[Request, Parse]:
        label = said[job.feature][job.whose] if job.score.of_label else None
        request = job.score.request(job.question, label, self.settings.thinking)
        return request, partial(job.score.parse, question=job.question)

    def _ask(
        self, jobs: Sequence[tuple[Request, Parse]], on_progress: Callable[[float], None]
    ) -> list[Usable | Failure | None]:
        """The answers in order, None for what the budget does not reach."""
        found: list[Usable | Failure | None] = [None] * len(jobs)
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = {pool.submit(self.asker.ask, request, parse): i for i, (request, parse) in enumerate(jobs)}
            try:
                for n, future in enumerate(as_completed(futures), 1):
                    try:
                        found[futures[future]] = future.result()
                    except OverBudget:
                        self._over_budget = True
                    on_progress(n / len(jobs))
            except BaseException:
                # What is on its way is paid for, and waited for; nothing else is sent.
                self.asker.endpoint.end()
                for future in futures:
                    future.cancel()
                raise
        return found

    def _groups(self, features: Sequence[int]) -> None:
        """Name the groups that the features are in."""
        found = groups_of(self.bundle, features, self.source, self.settings.seed)
        jobs = [(group_request(g.labels, self.settings.thinking), explanation_in) for g in found]
        for group, answer in zip(found, self._ask(jobs, lambda share: None), strict=True):
            match answer:
                case Usable(said, raw):
                    provenance = self.provenance | {"time": raw.time, "members": len(group.labels)}
                    self.bundle.user.set_group_label(
                        GroupLabel(
                            group.level, group.number, self.source, said.label, said.explanation, provenance, raw.time
                        )
                    )
                    self.tally.groups += 1
                case Failure():
                    self.tally.groups_failed += 1


def _share(update: Update, figures: Callable[[], str], at: int, n: int, n_all: int, share: float) -> None:
    """Tell how much of all is done by how much is done of some."""
    update((at + share * n) / n_all, figures())


def _collated(m: Material, asked: Sequence[tuple[_Job, Usable | Failure]]) -> dict[str, Any]:
    """A feature's scores, as they are stored."""
    by: dict[tuple[str, str], list[tuple[_Job, Any]]] = {}
    for job, answer in asked:
        value = answer.value if isinstance(answer, Usable) else None
        by.setdefault((job.whose, job.score.name), []).append((job, value))
    scores: dict[str, Any] = {}
    for (whose, name), some in by.items():
        place = scores if whose == "label" else scores.setdefault("baselines", {}).setdefault(whose, {})
        score = some[0][0].score
        place[name] = score.values([(job.question, value) for job, value in some])
        if whose == "label" and score.of_label:
            place[name] |= {
                "n_random": len(m.random),
                "n_neighbours": len(m.neighbours),
                "contamination": m.contamination[score.sees]._asdict(),
            }
    return scores
