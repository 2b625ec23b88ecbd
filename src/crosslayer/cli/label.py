"""`crosslayer label`: label features with a language model and score the labels (autointerp)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from crosslayer.autointerp.scores import SCORES
from crosslayer.core.console import progress, results

if TYPE_CHECKING:
    from crosslayer.bundles.bundle import FeatureBundle


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--endpoint",
    required=True,
    metavar="URL",
    help="URL of an OpenAI-compatible API, for example http://127.0.0.1:8080/v1 (llama.cpp, vLLM, Ollama, or hosted)",
)
@click.option("--model", required=True, help="model name at the endpoint; also the source of the saved labels")
@click.option(
    "--key-env",
    metavar="VARIABLE",
    help="environment variable with the API key; default: no key is sent",
)
@click.option(
    "--feature",
    "features",
    multiple=True,
    metavar="L/I",
    help="feature to label, for example L3/753; repeatable; default: all features",
)
@click.option(
    "--graph",
    type=click.Path(path_type=Path),
    help="label the features of a saved or exported graph, pruned as on the page",
)
@click.option("--group", metavar="LEVEL/NUMBER", help="label the features of a cluster, for example 0/12")
@click.option("--unnamed", is_flag=True, help="only features without a label by a rule or a person")
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    metavar="N",
    help="sample N of these features, evenly over layers and densities",
)
@click.option(
    "--budget",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="max tokens, prompt and completion; labels as many features as fit",
)
@click.option(
    "--score",
    "methods",
    multiple=True,
    type=click.Choice([*SCORES, "none"]),
    help="score to compute; repeatable; default: all",
)
@click.option(
    "--baseline",
    "baselines",
    multiple=True,
    type=click.Choice(["shuffled", "rule", "none"]),
    help="baseline scored on the same texts: another feature's label, or the label by rule; repeatable; default: both",
)
@click.option(
    "--groups/--no-groups",
    default=True,
    help="also label the clusters of these features, from the labels of their members",
)
@click.option(
    "--shown", type=click.IntRange(min=1), default=12, show_default=True, help="texts in the explanation prompt"
)
@click.option(
    "--texts",
    type=click.IntRange(min=2),
    default=10,
    show_default=True,
    help="texts to score with the feature active, and as many with it inactive",
)
@click.option("--window", type=click.IntRange(min=4, max=255), default=24, show_default=True, help="tokens per text")
@click.option("--per-call", type=click.IntRange(min=1), default=5, show_default=True, help="texts per scoring request")
@click.option(
    "--thinking",
    type=click.IntRange(min=0),
    default=0,
    metavar="TOKENS",
    help="extra completion tokens per answer, for reasoning models",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="seed of all sampling")
@click.option(
    "--concurrency", type=click.IntRange(1, 512), default=8, show_default=True, help="max concurrent requests"
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.1),
    default=120.0,
    show_default=True,
    metavar="S",
    help="seconds to wait for an answer",
)
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=6,
    show_default=True,
    help="retries per request, with exponential backoff",
)
@click.option(
    "--price-in",
    type=click.FloatRange(min=0),
    metavar="PRICE",
    help="price per million prompt tokens, for the estimate",
)
@click.option("--price-out", type=click.FloatRange(min=0), metavar="PRICE", help="price per million completion tokens")
@click.option("--dry-run", is_flag=True, help="print the estimate and stop, without any request")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="also write the summary to this JSON file")
def command(
    bundle: Path,
    endpoint: str,
    model: str,
    key_env: str | None,
    features: tuple[str, ...],
    graph: Path | None,
    group: str | None,
    unnamed: bool,
    sample: int | None,
    budget: int | None,
    methods: tuple[str, ...],
    baselines: tuple[str, ...],
    groups: bool,
    shown: int,
    texts: int,
    window: int,
    per_call: int,
    thinking: int,
    seed: int,
    concurrency: int,
    timeout: float,
    retries: int,
    price_in: float | None,
    price_out: float | None,
    dry_run: bool,
    out: Path | None,
) -> None:
    """Label features of BUNDLE with a language model and score the labels (autointerp).

    BUNDLE is a feature bundle, or a run with one. Labels are scored on documents that were not used for the
    explanation. Labels, scores and provenance are saved in user.sqlite of the bundle; your own labels take precedence.
    An interrupted run resumes when the command is repeated, and no answered request is sent again.
    """
    from functools import partial

    from crosslayer.autointerp.ask import Asker
    from crosslayer.autointerp.cache import CACHE, AnswerCache
    from crosslayer.autointerp.endpoint import Endpoint, Patience
    from crosslayer.autointerp.estimate import Prices, estimate
    from crosslayer.autointerp.report import print_estimate, print_summary
    from crosslayer.autointerp.run import Labelling
    from crosslayer.autointerp.settings import BASELINES, LabelSettings
    from crosslayer.bundles.bundle import load_features
    from crosslayer.core.errors import ConfigError, EndpointError
    from crosslayer.core.files import locked, require_writable, write_json
    from crosslayer.core.progress import track

    if out is not None:
        require_writable(out)
    if (price_in is None) != (price_out is None):
        raise ConfigError("one price was given without the other; give both --price-in and --price-out")
    prices = None if price_in is None or price_out is None else Prices(price_in, price_out)
    settings = LabelSettings(
        window=window,
        before=min(16, window * 2 // 3),
        n_shown=shown,
        n_positive=texts,
        n_negative=texts,
        per_call=per_call,
        methods=_chosen("--score", methods, tuple(SCORES)),
        baselines=_chosen("--baseline", baselines, BASELINES),
        thinking=thinking,
        seed=seed,
    )
    patience = Patience(timeout_s=timeout, retries=retries)
    opened = load_features(bundle)
    console = progress()
    with locked(opened.path, "wait for it"), Endpoint(endpoint, model, key_env, patience) as server:
        cache = AnswerCache(opened.path / CACHE)
        labelling = Labelling(opened, Asker(server, cache, budget), settings, concurrency=concurrency)
        chosen = _features(opened, features, graph, group, unnamed, sample, seed)
        known = cache.known(model)
        count = partial(
            estimate,
            opened,
            labelling.documents,
            settings=settings,
            known=known,
            concurrency=concurrency,
            prices=prices,
            groups=groups,
        )
        expected = count(chosen)
        if budget is not None and expected.tokens > budget:
            chosen = chosen[: int(len(chosen) * budget / expected.tokens)]
            if not chosen:
                raise ConfigError(
                    f"--budget {budget} is less than the estimated {expected.tokens // expected.n_features:,} tokens"
                    " per feature; raise it"
                )
            expected = count(chosen)
        print_estimate(console, model, server.host, expected, known, budget, concurrency)
        if dry_run:
            return
        with track(console, "label", 1.0) as update:
            summary = labelling.run(chosen, groups=groups, prices=prices, on_progress=update)
        cache.close()
    if out is not None:
        write_json(out, summary)
    print_summary(results(), summary)
    tried = summary["features"]
    if tried["failed"] and not tried["labelled"]:
        reason = next(iter(summary["reasons"]), "no answer")
        raise EndpointError(
            f"{model} labelled none of {tried['failed']} features ({reason}); check that {endpoint} serves an"
            " instruction-tuned model, or give another --model"
        )


def _chosen(flag: str, given: tuple[str, ...], every: tuple[str, ...]) -> tuple[str, ...]:
    from crosslayer.core.errors import ConfigError

    if "none" in given and len(given) > 1:
        raise ConfigError(f"{flag} none contradicts {flag} {next(g for g in given if g != 'none')}; give one of them")
    return tuple(x for x in every if x in (given or every))


def _features(
    opened: FeatureBundle,
    features: tuple[str, ...],
    graph: Path | None,
    group: str | None,
    unnamed: bool,
    sample: int | None,
    seed: int,
) -> list[int]:
    """Return the flat ids of the selected features, in labelling order."""
    from crosslayer.autointerp import choose
    from crosslayer.cli.features import parse_feature
    from crosslayer.core.errors import ConfigError

    given = [flag for flag, x in (("--feature", features), ("--graph", graph), ("--group", group)) if x]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} each select the features; give one of them")
    if features:
        found = list(dict.fromkeys(opened.id(*parse_feature(text)) for text in features))
    elif graph is not None:
        found = choose.of_graph(opened, graph)
    elif group is not None:
        found = choose.of_group(opened, *_group(group), seed)
    else:
        found = choose.of_all(opened, seed)
    if unnamed:
        found = choose.unnamed(opened, found)
    if sample is not None:
        found = choose.sample(opened, found, sample, seed)
    if not found:
        raise ConfigError("no feature is left to label; select others, or omit --unnamed")
    return found


def _group(text: str) -> tuple[int, int]:
    import re

    from crosslayer.core.errors import ConfigError

    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is not a group; write LEVEL/NUMBER, for example 0/12")
    return int(match[1]), int(match[2])
