"""A labelling run: explain and score features in batches, and save each label.

Labels and scores are saved as soon as they are available, and all answers are cached. An interrupted run resumes when
its command is repeated: the run builds the same requests, sends only those without a cached answer, and ends with the
same result.
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
"""Features per batch: all are explained before the first is scored, and labels are shuffled within it."""
VIEW = "labelling"
"""Kind of the view in `user.sqlite` that stores the summary of a run, named by the model."""

Parse = Callable[[Answer], Any]


class _Job(NamedTuple):
    """A question about a feature, and whose label it shows: the feature's own or a baseline's."""

    feature: int
    whose: str
    score: Score
    question: Question


class Labelling:
    """Labels features of a bundle with a language model.

    Args:
        concurrency: max concurrent requests.

    Raises:
        ConfigError: for a model name that is empty or reserved for another source of labels, and an unknown score.
    """

    def __init__(self, bundle: FeatureBundle, asker: Asker, settings: LabelSettings, *, concurrency: int = 8) -> None:
        self.source = asker.endpoint.model
        if self.source.strip().lower() in (PERSON, "rule", ""):
            name = self.source.strip().lower()
            problem = f"is reserved for labels by {name}" if name else "is empty"
            raise ConfigError(f"--model {self.source!r} {problem}; serve the model under another name")
        self.bundle, self.asker, self.settings, self.concurrency = bundle, asker, settings, concurrency
        self.scores = chosen(settings)
        self.documents = Documents(bundle)
        self.tally = Tally()
        self._over_budget = False

    @property
    def provenance(self) -> dict[str, Any]:
        """Provenance of each label: model, endpoint, prompt version and settings."""
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.settings).items()}
        settings["methods"] = [score.name for score in self.scores]
        return {
            "model": self.source,
            "endpoint": self.asker.endpoint.host,
            "prompt_version": PROMPT_VERSION,
            "documents": self.documents.identification,
            "settings": settings,
            "crosslayer": version("crosslayer"),
        }

    def run(
        self,
        features: Sequence[int],
        *,
        groups: bool = True,
        prices: Prices | None = None,
        on_progress: Update = lambda done, metrics="": None,
    ) -> dict[str, Any]:
        """Label and score the features and label their groups; save and return the summary.

        Args:
            on_progress: called with the fraction done.

        Raises:
            EndpointError: if the endpoint stops answering; answers so far are saved.
        """
        began = time.monotonic()
        n_parts = -(-len(features) // AT_ONCE)
        for part in range(n_parts):
            # Batches of equal size, so that the last is large enough to shuffle labels.
            at, end = (len(features) * i // n_parts for i in (part, part + 1))
            batch = features[at:end]
            if self._over_budget:
                self.tally.unasked += len(batch)
                continue
            self._batch(batch, partial(_share, on_progress, self._metrics, at, len(batch), len(features)))
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

    def _metrics(self) -> str:
        spent = self.asker.spent
        return f"{self.tally.labelled:,} labelled, {spent.calls:,} calls, {spent.tokens:,} tokens"

    def _batch(self, features: Sequence[int], on_progress: Callable[[float], None]) -> None:
        materials = {f: material(self.bundle, self.documents, f, self.settings) for f in features}
        shown = [m for m in materials.values() if m.shown]
        self.tally.no_examples += len(features) - len(shown)
        labels = self._explain(shown, on_progress)
        judged = self._labels_to_judge({f: label for f, (label, _) in labels.items()})
        jobs = self._jobs([materials[f] for f in labels], judged)
        answers = self._ask([self._question(j, judged) for j in jobs], lambda share: on_progress(0.1 + 0.9 * share))
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
                self._save(f, labels[f], scores)

    def _explain(
        self, shown: Sequence[Material], on_progress: Callable[[float], None]
    ) -> dict[int, tuple[Explanation, Answer]]:
        """Explain features and save the labels at once."""
        requests = [
            explain_request(m.shown, m.contrast, self._promoted(m.feature), self.settings.thinking) for m in shown
        ]
        found: dict[int, tuple[Explanation, Answer]] = {}
        for m, answer in zip(
            shown, self._ask([(r, explanation_in) for r in requests], lambda s: on_progress(0.1 * s)), strict=True
        ):
            match answer:
                case Usable(explanation, raw):
                    found[m.feature] = (explanation, raw)
                    self._save(m.feature, found[m.feature], None)
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

    def _save(self, feature: int, explained: tuple[Explanation, Answer], scores: dict[str, Any] | None) -> None:
        """Save a label; if it has no scores and equals the saved label, keep the saved one with its scores."""
        label, answer = explained
        if scores is None:
            saved = next(
                (x for x in self.bundle.user.labels([feature]).get(feature, []) if x.source == self.source), None
            )
            if saved is not None and (saved.label, saved.explanation) == label:
                return
        provenance = self.provenance | {"time": answer.time}
        self.bundle.user.set_label(
            Label(feature, self.source, label.label, label.explanation, scores, provenance, answer.time)
        )

    def _labels_to_judge(self, labels: dict[int, Explanation]) -> dict[int, dict[str, Explanation]]:
        """Return the labels to judge per feature: its own, another feature's different label, and the label by rule."""
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

    def _jobs(self, materials: Sequence[Material], labels: dict[int, dict[str, Explanation]]) -> list[_Job]:
        """Return all questions that score the features."""
        return [
            _Job(m.feature, who, score, question)
            for m in materials
            for score in self.scores
            for question in score.questions(m, self.settings)
            for who in (labels[m.feature] if score.of_label else ("label",))
        ]

    def _question(self, job: _Job, labels: dict[int, dict[str, Explanation]]) -> tuple[Request, Parse]:
        label = labels[job.feature][job.whose] if job.score.of_label else None
        request = job.score.request(job.question, label, self.settings.thinking)
        return request, partial(job.score.parse, question=job.question)

    def _ask(
        self, jobs: Sequence[tuple[Request, Parse]], on_progress: Callable[[float], None]
    ) -> list[Usable | Failure | None]:
        """Return the answers in order; None for requests beyond the budget."""
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
                # Requests in flight are paid for, so wait for them; send no others.
                self.asker.endpoint.end()
                for future in futures:
                    future.cancel()
                raise
        return found

    def _groups(self, features: Sequence[int]) -> None:
        """Label the groups that the features are in."""
        found = groups_of(self.bundle, features, self.source, self.settings.seed)
        jobs = [(group_request(g.labels, self.settings.thinking), explanation_in) for g in found]
        for group, answer in zip(found, self._ask(jobs, lambda share: None), strict=True):
            match answer:
                case Usable(explanation, raw):
                    provenance = self.provenance | {"time": raw.time, "members": len(group.labels)}
                    self.bundle.user.set_group_label(
                        GroupLabel(
                            group.level,
                            group.number,
                            self.source,
                            explanation.label,
                            explanation.explanation,
                            provenance,
                            raw.time,
                        )
                    )
                    self.tally.groups += 1
                case Failure():
                    self.tally.groups_failed += 1


def _share(update: Update, metrics: Callable[[], str], at: int, n: int, n_all: int, share: float) -> None:
    """Report progress of all features from the progress of one batch."""
    update((at + share * n) / n_all, metrics())


def _collated(m: Material, asked: Sequence[tuple[_Job, Usable | Failure]]) -> dict[str, Any]:
    """Return a feature's scores in their stored form."""
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
