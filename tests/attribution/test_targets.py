"""Targets: tokens, differences, directions and features, at any position."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import crosslayer as xl
import tiny
from crosslayer.attribution.targets import Target, parse_target
from crosslayer.core.errors import ConfigError, HostError, ResourceError
from pairs import TOKENS, Pair


def rows(graph: xl.Graph) -> np.ndarray:
    return graph.to_dense()[graph.first_target :, : graph.first_target]


def test_default_targets_are_the_fewest_tokens_that_reach_95_percent(pair: Pair):
    graph = xl.attribute(*pair, TOKENS)
    logits = pair.host.run(torch.tensor([TOKENS]))
    assert logits is not None
    p, order = logits[0, -1].softmax(0).sort(descending=True)
    n = min(10, int((p.cumsum(0) < 0.95).sum()) + 1)
    assert [t.token for t in graph.header.targets] == order[:n].tolist()
    assert [t.weight for t in graph.header.targets] == pytest.approx(p[:n].tolist(), rel=1e-5)


def test_difference_target_is_the_difference_of_rows(pair: Pair):
    one, two, both = rows(xl.attribute(*pair, TOKENS, targets=["#5", "#9", "#5-minus-#9"], tolerance=0.0))
    np.testing.assert_allclose(both, one - two, atol=1e-5)


def test_vector_target_matches_an_unembedding_row(pair: Pair):
    U = pair.host.model.get_output_embeddings().weight
    vector = U[5] - U.mean(0)
    one, two = rows(xl.attribute(*pair, TOKENS, targets=[5, xl.Target(vector=vector)], tolerance=0.0))
    np.testing.assert_allclose(one, two, atol=1e-6)


def test_feature_target_has_the_row_of_the_feature(pair: Pair):
    full = xl.attribute(*pair, TOKENS, tolerance=0.0)
    a = full.arrays
    node = int(np.flatnonzero(a.layer_F == 2)[4])
    text = f"L2/{a.index_F[node]}@{a.position_F[node]}"
    graph = xl.attribute(*pair, TOKENS, targets=[text], tolerance=0.0)
    np.testing.assert_allclose(rows(graph)[0], full.to_dense()[node, : full.first_target], atol=1e-6)
    assert graph.header.targets[0].kind == "feature"
    assert graph.influence_N[: graph.n_features][a.layer_F >= 2].max() == 0


def test_edges_come_from_no_later_position(pair: Pair):
    graph = xl.attribute(*pair, TOKENS, targets=["#5@3"], tolerance=0.0)
    late = graph.arrays.position_F > 3
    assert late.any()
    assert not graph.influence_N[: graph.n_features][late].any()


def test_targets_of_several_positions_and_layers_together(pair: Pair):
    together = xl.attribute(*pair, TOKENS, targets=["#5@6", "#9@2", "#3@4"], tolerance=0.0)
    alone = [rows(xl.attribute(*pair, TOKENS, targets=[t], tolerance=0.0))[0] for t in ("#5@6", "#9@2", "#3@4")]
    np.testing.assert_allclose(rows(together), np.stack(alone), atol=1e-6)


def test_token_by_its_text(pair: Pair):
    text = pair.host.decode_token(300)
    named = xl.attribute(*pair, TOKENS, targets=text)
    assert named.header.targets[0].token == 300


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("self", {"token": "self", "position": -1}),
        (" self@3", {"token": " self", "position": 3}),
        ("#12@-2", {"token": 12, "position": -2}),
        ("@", {"token": "@"}),
        ("a@b", {"token": "a@b"}),
        ("L3/14@5", {"feature": (3, 14), "position": 5}),
        ("yes-minus-no", {"token": "yes", "minus": "no"}),
    ],
)
def test_parse_target(text: str, fields: dict[str, object]):
    target = parse_target(text)
    assert {k: getattr(target, k) for k in fields} == fields


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"targets": ["def class return"]}, "is [0-9]+ tokens of qwen3"),
        ({"targets": [tiny.N_VOCAB]}, "token 320 is outside the vocabulary"),
        ({"targets": ["#5@7"]}, "position 7 is not among the prompt's 7 tokens; give 0 to 6"),
        ({"targets": ["L9/3"]}, "there is no feature 3 in layer 9; the transcoder has 3 layers of 40"),
        ({"targets": ["L1/400"]}, "there is no feature 400"),
        ({"targets": []}, "no target was given"),
        ({"targets": [5, "#5"]}, "is given twice; name it once"),
        ({"targets": [xl.Target(vector=torch.zeros(3))]}, r"shape \(3,\) does not fit the width"),
        ({"tolerance": 1.5}, "tolerance=1.5 must be between 0 and 1"),
        ({"tolerance": float("nan")}, "tolerance=nan must be"),
        ({"max_nodes": 0}, "max_nodes=0 must be at least 1"),
        ({"precision": "fp8"}, "give one of auto, fp32, bf16"),
    ],
)
def test_bad_targets_and_settings(pair: Pair, knobs: dict[str, object], words: str):
    with pytest.raises(ConfigError, match=words):
        xl.attribute(*pair, TOKENS, **knobs)


def test_bad_prompts(pair: Pair):
    for prompt in ("", []):
        with pytest.raises(ConfigError, match="give"):
            xl.attribute(*pair, prompt)
    with pytest.raises(HostError, match="70 tokens exceed the context"):
        xl.attribute(*pair, [5] * 70)
    with pytest.raises(ConfigError, match="token 999 is not among"):
        xl.attribute(*pair, [5, 999])


def test_inactive_feature_target_is_refused(pair: Pair):
    graph = xl.attribute(*pair, TOKENS)
    a = graph.arrays
    inactive = next(i for i in range(40) if not ((a.layer_F == 1) & (a.index_F == i) & (a.position_F == 6)).any())
    with pytest.raises(ConfigError, match=f"feature {inactive} of layer 1 is not active at position 6"):
        xl.attribute(*pair, TOKENS, targets=[f"L1/{inactive}"])


def test_target_takes_exactly_one_kind():
    with pytest.raises(ConfigError, match="exactly one"):
        xl.Target(token=3, feature=(1, 2))
    with pytest.raises(ConfigError, match="weight must be positive"):
        xl.Target(token=3, weight=-1.0)


def test_transcoder_of_another_host_is_refused(pair: Pair):
    from crosslayer.clt.config import CLTConfig
    from crosslayer.clt.transcoder import CLT

    for shape in ({"n_layers": 2, "d_model": 16}, {"n_layers": 3, "d_model": 8}):
        with pytest.raises(ConfigError):
            xl.attribute(pair.host, CLT(CLTConfig(n_features=8, **shape)), TOKENS)


def test_too_little_memory_is_reported_before_starting(pair: Pair, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("crosslayer.core.memory.free_bytes", lambda: 1 << 20)
    with pytest.raises(ResourceError, match=r"GiB of memory but 0\.0 GiB are free; set or lower max_nodes"):
        xl.attribute(*pair, TOKENS)
    monkeypatch.setattr("crosslayer.core.memory.free_bytes", lambda: 100)
    with pytest.raises(ResourceError, match="attention patterns of 7 tokens take about"):
        xl.attribute(*pair, TOKENS)
    with pytest.raises(
        ResourceError, match=r"1 sets of interventions on 7 tokens take about .* run fewer sets at once"
    ):
        xl.intervene(*pair, TOKENS, [])


@pytest.mark.parametrize("targets", [["#5", "#9-minus-#9"], [Target(vector=torch.zeros(tiny.D_MODEL))]])
def test_zero_target_is_refused(pair: Pair, targets: list):
    with pytest.raises(ConfigError, match="is a zero direction"):
        xl.attribute(*pair, TOKENS, targets=targets)


@pytest.mark.parametrize("text", ["x@²", "#²", "L²/3", "x@--3"])
def test_digits_of_other_scripts_are_text(text: str):
    target = parse_target(text)
    assert (target.token, target.position) == (text, -1)


def test_numpy_numbers_are_tokens(pair: Pair):
    graph = xl.attribute(*pair, TOKENS, targets=[np.int64(5), 6])
    assert [t.token for t in graph.header.targets] == [5, 6]
    assert graph.header.settings["targets"] == [t.name for t in graph.header.targets]
