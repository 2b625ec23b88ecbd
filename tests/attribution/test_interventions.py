"""Interventions: measured effects equal the edges when everything else is held, and no change has no effect."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest
import torch

import crosslayer as xl
import tiny
from crosslayer.attribution.interventions import Intervention, Watch
from crosslayer.attribution.validate import validate
from crosslayer.core.errors import ConfigError
from crosslayer.graphs import merge
from pairs import TOKENS, Pair, make_pair

ALL = range(tiny.N_LAYERS)


@pytest.mark.parametrize("family", list(tiny.CONFIGS))
@pytest.mark.parametrize("skip", [False, True])
def test_edge_is_the_effect_with_everything_else_held(family: str, skip: bool):
    pair = make_pair(family, skip=skip)
    graph = xl.attribute(*pair, TOKENS, tolerance=0.0)
    a, dense = graph.arrays, graph.to_dense()
    sources = [int(n) for n in np.argsort(-np.abs(dense).sum(0)[: graph.n_features])[:3]]
    later = [int(n) for n in np.flatnonzero(a.layer_F > 0)]
    watch = [Watch(int(a.layer_F[n]), int(a.position_F[n]), int(a.index_F[n])) for n in later]
    sets = [
        [Intervention(layer=int(a.layer_F[s]), index=int(a.index_F[s]), positions=int(a.position_F[s]), scale=1.5)]
        for s in sources
    ]
    r = xl.intervene(*pair, TOKENS, sets, freeze="both", hold=ALL, watch=watch)
    for row, s in enumerate(sources):
        predicted = 0.5 * dense[later, s]
        measured = (r.watched_BK[row] - r.watched_before_K).numpy()
        assert np.abs(measured - predicted).max() <= 1e-3 * np.abs(predicted).max()
        change = r.linear_after_BTV[row, -1] - r.linear_before_TV[-1]
        tokens = [t.token for t in graph.header.targets]
        predicted = 0.5 * dense[graph.first_target :, s]
        assert np.abs((change[tokens] - change.mean()).numpy() - predicted).max() <= 1e-3 * np.abs(predicted).max()


@pytest.mark.parametrize("family", list(tiny.CONFIGS))
def test_no_change_is_bitwise_identical(family: str):
    """Also with edits that are not empty: active features keep their activation, silent ones stay silent."""
    pair = make_pair(family)
    a = xl.attribute(*pair, TOKENS).arrays
    active = [(int(a.layer_F[n]), int(a.index_F[n])) for n in np.flatnonzero(a.position_F == 2)[:4]]
    silent = next(i for i in range(40) if not ((a.layer_F == 1) & (a.index_F == i)).any())
    sets = [
        [],
        [Intervention(layer=layer, index=index, scale=1.0) for layer, index in active],
        [Intervention(layer=1, index=silent, scale=0.0)],
        [Intervention(layer=1, index=silent, set=0.0)],
    ]
    assert len(active) == 4
    for one in sets:
        r = xl.intervene(*pair, TOKENS, one)
        torch.testing.assert_close(r.after_BTV[0], r.before_TV, rtol=0, atol=0)
        assert r.changes == [[0.0] * len(one)]


def test_logits_before_and_after_the_softcap():
    pair = make_pair("gemma2")
    r = xl.intervene(*pair, TOKENS, [])
    own = pair.host.run(torch.tensor([TOKENS]))
    assert own is not None
    torch.testing.assert_close(r.before_TV, own[0])
    cap = pair.host.softcap
    torch.testing.assert_close(cap * torch.tanh(r.linear_before_TV / cap), own[0])
    assert not torch.allclose(r.linear_before_TV, own[0])


@pytest.mark.parametrize("skip", [False, True])
def test_replaced_mlps_without_changes_reproduce_the_host(skip: bool):
    pair = make_pair(skip=skip)
    r = xl.intervene(*pair, TOKENS, [], mlps="replaced")
    torch.testing.assert_close(r.after_BTV[0], r.before_TV, rtol=1e-4, atol=1e-4)


def test_batch_matches_single_interventions(pair: Pair):
    sets = [[Intervention(layer=0, index=i, set=2.0, positions=slice(2, None))] for i in (1, 2, 3)]
    together = xl.intervene(*pair, TOKENS, sets, mlps="replaced")
    for row, one in enumerate(sets):
        alone = xl.intervene(*pair, TOKENS, one, mlps="replaced")
        torch.testing.assert_close(together.after_BTV[row], alone.after_BTV[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together.after_BTV[0], together.after_BTV[1])


def test_positions_restrict_the_intervention(pair: Pair):
    r = xl.intervene(*pair, TOKENS, [Intervention(layer=0, index=5, set=3.0, positions=4)])
    torch.testing.assert_close(r.after_BTV[0, :4], r.before_TV[:4])
    assert not torch.allclose(r.after_BTV[0, 4:], r.before_TV[4:])
    last = [
        xl.intervene(*pair, TOKENS, [Intervention(layer=0, index=5, set=3.0, positions=p)])
        for p in (-1, 6, [6], np.int64(6))
    ]
    for other in last[1:]:
        torch.testing.assert_close(other.after_BTV, last[0].after_BTV)


def from_the_start(pair: Pair, tokens: list[int], edits: list[Intervention], mlps: str, hold: Collection[int]) -> int:
    """The next token of a whole text, without a cache and with dense features; the prompt is the first of it."""
    host, clt = pair
    n = len(TOKENS)
    prompt = host.tap(torch.tensor([TOKENS]))
    pending = torch.zeros(tiny.N_LAYERS, len(tokens), tiny.D_MODEL)

    def visit(layer: int, x_BTD: torch.Tensor, y_BTD: torch.Tensor) -> torch.Tensor:
        f_TF, was_TF = clt.encode_layer(x_BTD[0], layer), clt.encode_layer(prompt.x_BTLD[0, :, layer], layer)
        change_TF, out_TD = torch.zeros_like(f_TF), y_BTD[0].clone()
        if mlps == "replaced":
            change_TF[1:] = f_TF[1:]
            change_TF[1:n] -= was_TF[1:]
            out_TD[n:] = clt.b_dec[layer]
        if mlps == "replaced" or layer in hold:
            out_TD[1:n] = prompt.y_BTLD[0, 1:, layer]
        now_TF = f_TF.clone()
        if layer in hold:
            change_TF[:n], now_TF[:n] = 0, was_TF
        for i in edits:
            if i.layer == layer:
                change_TF[i.positions, i.index] += i.set - now_TF[i.positions, i.index]
        for slot, W_FD in enumerate(clt.W_dec[layer].unbind(1)):
            pending[layer + slot] += change_TF @ W_FD
        return (out_TD + pending[layer])[None]

    logits = host.run(torch.tensor([tokens]), visit)
    assert logits is not None
    return int(logits[0, -1].argmax())


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("mlps", ["host", "replaced"])
@pytest.mark.parametrize("hold", [(), (1,), ALL])
def test_generated_tokens_equal_those_without_a_cache(family: str, mlps: str, hold: Collection[int]):
    """Open positions include generated tokens; layers are held at the prompt only."""
    pair = make_pair(family)
    edits = [Intervention(layer=i % 2, index=i, set=4.0, positions=slice(3, None)) for i in (1, 2, 5)]
    for some in (edits, []):
        r = xl.intervene(*pair, TOKENS, some, generate=6, mlps=mlps, hold=hold)
        tokens = list(TOKENS)
        for _ in range(6):
            tokens.append(from_the_start(pair, tokens, some, mlps, hold))
        assert r.generated[0] == tokens[len(TOKENS) :]
        tokens = list(TOKENS)
        for _ in range(6):
            tokens.append(from_the_start(pair, tokens, [], "host", ()))
        assert r.generated_before == tokens[len(TOKENS) :]


def test_changes_are_those_of_the_features():
    pair = make_pair()
    f_TF = pair.clt.encode_layer(pair.host.tap(torch.tensor([TOKENS])).x_BTLD[0, :, 1], 1)
    active, silent = int(f_TF[3].argmax()), int((f_TF[1:].amax(0) == 0).nonzero()[0])
    sets = [
        [Intervention(layer=1, index=active, positions=3, scale=0), Intervention(layer=1, index=silent, scale=0)],
        [Intervention(layer=1, index=silent, set=2.5)],
    ]
    (ablated, nothing), (added,) = xl.intervene(*pair, TOKENS, sets).changes
    assert ablated == pytest.approx(float(f_TF[3, active]), rel=1e-5)
    assert nothing == 0
    assert added == 2.5


def test_held_layers_leave_only_direct_effects(pair: Pair):
    """With all layers held and an edit in the last layer, only the logits can change."""
    watch = [Watch(layer, 6, i) for layer in ALL for i in range(5)]
    r = xl.intervene(*pair, TOKENS, [Intervention(layer=2, index=3, set=5.0, positions=6)], hold=ALL, watch=watch)
    torch.testing.assert_close(r.watched_BK[0], r.watched_before_K, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(r.after_BTV[0, 6], r.before_TV[6])


@pytest.mark.parametrize(
    ("interventions", "knobs", "words"),
    [
        ([Intervention(layer=5, index=0, scale=0.0)], {}, "there is no feature 0 in layer 5"),
        ([Intervention(layer=0, index=99, scale=0.0)], {}, "there is no feature 99"),
        ([Intervention(layer=0, index=9, scale=0.0, positions=7)], {}, "position 7 is not among the prompt's 7 tokens"),
        (
            [Intervention(layer=0, index=9, scale=0.0, positions=0)],
            {},
            "position 0 is among the first 1, which have no features",
        ),
        (
            [Intervention(layer=0, index=9, scale=0.0, positions=slice(0, 1))],
            {},
            "the positions of L0/9 are among the first 1, which have no features",
        ),
        ([], {"hold": [3]}, "there is no layer 3 to hold"),
        ([], {"freeze": "heads"}, "freeze='heads' is unknown; give one of none, attention"),
        ([], {"mlps": "mine"}, "give host or replaced"),
        ([], {"generate": 60}, "does not fit the context"),
        ([], {"watch": [Watch(0, 9, 1)]}, "does not exist on this prompt and cannot be watched"),
    ],
)
def test_bad_interventions(pair: Pair, interventions: list[Intervention], knobs: dict[str, object], words: str):
    with pytest.raises(ConfigError, match=words):
        xl.intervene(*pair, TOKENS, interventions, **knobs)


@pytest.mark.parametrize(
    "two",
    [
        [Intervention(layer=0, index=3, scale=0), Intervention(layer=0, index=3, scale=0)],
        [Intervention(layer=0, index=3, scale=0), Intervention(layer=0, index=3, positions=4, set=2.0)],
        [
            Intervention(layer=0, index=3, positions=slice(2, 5), scale=0),
            Intervention(layer=0, index=3, positions=-3, set=2.0),
        ],
    ],
)
def test_two_changes_of_one_feature_at_one_position_are_refused(pair: Pair, two: list[Intervention]):
    with pytest.raises(ConfigError, match="L0/3 is changed twice at position"):
        xl.intervene(*pair, TOKENS, two)
    # In separate sets they do not conflict.
    xl.intervene(*pair, TOKENS, [[i] for i in two])


def test_positions_outside_the_prompt_are_refused(pair: Pair):
    with pytest.raises(ConfigError, match="hold none of the prompt's 7"):
        xl.intervene(*pair, TOKENS, [Intervention(layer=0, index=3, positions=slice(99, None), scale=0)])


def test_batchtopk_is_refused():
    pair = make_pair(activation="batchtopk", k=5, scope="layer")
    with pytest.raises(ConfigError, match="ranks the tokens of a batch together"):
        xl.intervene(*pair, TOKENS, [Intervention(layer=0, index=3, scale=0)])


def test_one_of_set_and_scale():
    for fields in ({}, {"set": 1.0, "scale": 2.0}):
        with pytest.raises(ConfigError, match="exactly one of set and scale"):
            Intervention(layer=0, index=0, **fields)
    with pytest.raises(ConfigError, match="finite"):
        Intervention(layer=0, index=0, set=float("nan"))


def test_validation_is_perfect_with_exact_edges(pair: Pair):
    graph = xl.attribute(*pair, TOKENS, tolerance=0.0)
    v = validate(graph, *pair, n_sources=6, freeze="both")
    assert v.n_sources == 6
    assert v.n_pairs > 100
    assert v.feature_pearson > 0.99999
    assert v.feature_spearman > 0.999
    loose = validate(graph, *pair, n_sources=6)
    assert 0.5 < loose.feature_pearson < 1
    assert -1 <= loose.kl_spearman <= 1
    assert np.isnan(v.cosine_L[0])
    assert ((v.cosine_L[1:] >= -1) & (v.cosine_L[1:] <= 1)).all()


def test_merged_graphs(pair: Pair):
    other = [*TOKENS[:-1], 44]
    graphs = [xl.attribute(*pair, t) for t in (TOKENS, other)]
    merged = merge(graphs)
    for g, graph in enumerate(graphs):
        total = graph.weight_N.sum()
        assert merged.influence_GF[g].sum() == pytest.approx(graph.influence_N[: graph.n_features].sum() / total)
    has = merged.influence_GF > 0
    assert (merged.shared() | merged.only(0) | merged.only(1) | ~has.any(0)).all()
    assert merged.shared().any()
    same = merge([graphs[0], graphs[0]])
    assert not same.difference().any()
    assert not same.only(0).any()
    np.testing.assert_allclose(same.mean_edges().toarray(), same.edges[0].toarray())
    with pytest.raises(ConfigError, match="no graph"):
        merge([])
