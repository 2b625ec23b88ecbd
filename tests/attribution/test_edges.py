"""Edges match autograd through the host itself, for every family: the local replacement model is exact."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import crosslayer as xl
import tiny
from crosslayer.attribution.descent import Plan
from crosslayer.attribution.freeze import frozen
from crosslayer.attribution.local import LocalModel, local_model
from crosslayer.attribution.targets import Target
from crosslayer.attribution.writes import Writes
from crosslayer.graphs.graph import Graph
from pairs import TOKENS, Pair, make_pair

AFTER_NORM, BEFORE_NORM = ("mlp.hook_in", "mlp.hook_out"), ("hook_resid_mid", "hook_mlp_out")
BEFORE_GAIN = ("ln2.hook_normalized", "hook_mlp_out")
CASES = [
    (family, hooks, skip)
    for family in tiny.CONFIGS
    for hooks in (AFTER_NORM, BEFORE_NORM)
    for skip in (False, True)
    if not (family == "gpt_neox" and hooks == BEFORE_NORM)
] + [
    (family, BEFORE_GAIN, skip)
    for family, skip in (("gpt2", True), ("gpt_neox", False), ("gemma2", False), ("gemma2", True))
]


def local_of(pair: Pair) -> tuple[LocalModel, torch.Tensor]:
    local = local_model(pair.host, pair.clt, torch.tensor(TOKENS))
    writes = Writes(local, local.dtype)
    writes.fill(pair.clt)
    return local, writes.made_LTD


@pytest.mark.parametrize(("family", "hooks", "skip"), CASES)
def test_local_model_reproduces_the_host_logits(family: str, hooks: tuple[str, str], skip: bool):
    local, made_LTD = local_of(make_pair(family, hooks=hooks, skip=skip))
    own = local.anatomy.host.unembed(local.host_pass.hidden_TD)
    assert (local.logits(made_LTD) - own).abs().max() <= 1e-5 * own.abs().max()
    assert not torch.allclose(local.logits(torch.zeros_like(made_LTD)), own, rtol=1e-2)


@pytest.mark.parametrize(("family", "hooks", "skip"), CASES)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_incoming_edges_sum_to_the_preactivation(
    family: str, hooks: tuple[str, str], skip: bool, dtype: torch.dtype, most: float
):
    pair = make_pair(family, hooks=hooks, skip=skip, dtype=dtype)
    for tolerance in (0.0, 0.1):
        graph = xl.attribute(*pair, TOKENS, tolerance=tolerance)
        assert graph.sum_error() < most
        assert (graph.arrays.row_R < graph.n_features).sum() > 10


@pytest.mark.parametrize(("family", "hooks", "skip"), CASES)
def test_edges_match_autograd_per_target(family: str, hooks: tuple[str, str], skip: bool):
    pair = make_pair(family, hooks=hooks, skip=skip, dtype=torch.float64)
    graph = xl.attribute(*pair, TOKENS, tolerance=0.0, targets=["#5", "#7@3", "#9-minus-#2", "#11@0"])
    rows, expected = brute_force(pair, graph)
    dense = graph.to_dense()[rows]
    scale = np.abs(expected).max(1, keepdims=True)
    # The norms of some families always compute in float32, so autograd's own path is not more exact.
    assert (np.abs(dense - expected) <= 1e-5 * scale + 1e-12).all()
    assert (scale > 0).mean() > 0.9


def brute_force(pair: Pair, graph: Graph) -> tuple[list[int], np.ndarray]:
    """Compute rows of edges by autograd through the host's modules, with patterns and scales frozen.

    The rows are those of a fifth of the features and of all targets.
    """
    host, clt = pair
    local, _ = local_of(pair)
    a, n_layers, n_positions = graph.arrays, host.n_layers, len(TOKENS)
    leaves = [local.host_pass.y_LTD[i].clone()[None].requires_grad_() for i in range(n_layers)]
    xs: list[torch.Tensor] = []
    embedded: list[torch.Tensor] = []

    def visit(layer: int, x_BTD: torch.Tensor, _y: torch.Tensor) -> torch.Tensor:
        xs.append(x_BTD)
        if not clt.config.skip:
            return leaves[layer]
        through = clt.skip(x_BTD, layer) - clt.skip(x_BTD, layer).detach()
        return leaves[layer] + torch.cat([torch.zeros_like(through[:, :1]), through[:, 1:]], dim=1)

    def keep_embedding(_m: Any, _i: Any, out: torch.Tensor) -> torch.Tensor:
        embedded.append(out.detach().requires_grad_())
        return embedded[0]

    hook = host.model.get_input_embeddings().register_forward_hook(keep_embedding)
    with frozen(local, "both"), host.without_softcap():
        logits = host.run(torch.tensor([TOKENS]), visit)
    hook.remove()
    assert logits is not None
    centred = (logits - logits.mean(-1, keepdim=True))[0]
    values: list[tuple[int, torch.Tensor]] = []
    for n in range(0, graph.n_features, 5):
        layer, position, index = int(a.layer_F[n]), int(a.position_F[n]), int(a.index_F[n])
        values.append((n, xs[layer][0, position] @ clt.W_enc[layer][index]))
    last = centred[-1]
    for i, value in enumerate([last[5], centred[3][7], last[9] - last[2], centred[0][11]]):
        values.append((graph.first_target + i, value))
    dense = np.zeros((graph.n_nodes, graph.n_nodes))
    errors = local.error_LTD
    for n, value in values:
        grads = torch.autograd.grad(value, [*leaves, embedded[0]], retain_graph=True, allow_unused=True)
        g_LTD = torch.stack([torch.zeros_like(leaves[0][0]) if g is None else g[0] for g in grads[:-1]])
        for s in range(graph.n_features):
            layer, position = int(a.layer_F[s]), int(a.position_F[s])
            row_SD = clt.W_dec[layer][int(a.index_F[s])]
            dense[n, s] = a.activation_F[s] * float((row_SD * g_LTD[layer:, position][: len(row_SD)]).sum())
        error_LT = (errors * g_LTD).sum(-1)
        dense[n, graph.first_error : graph.first_token] = error_LT.flatten().numpy()
        token = grads[-1]
        if token is not None:
            dense[n, graph.first_token : graph.first_target] = (token[0] * embedded[0][0]).sum(-1).detach().numpy()
    assert n_positions == graph.n_positions
    rows = [n for n, _ in values]
    return rows, dense[rows]


def test_per_layer_transcoders_and_longer_prompts():
    pair = make_pair("qwen3", dtype=torch.float64, cross_layer=False)
    assert xl.attribute(*pair, TOKENS, tolerance=0.0).sum_error() < 1e-9
    long = torch.randint(0, tiny.N_VOCAB, (50,), generator=torch.Generator().manual_seed(0))
    assert xl.attribute(*make_pair(dtype=torch.float64), long, tolerance=0.05, max_nodes=200).sum_error() < 1e-9


@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_other_activations(kind: str):
    config = {"activation": kind, "k": 6, "scope": "layer"} if kind == "topk" else {"activation": kind}
    pair = make_pair(dtype=torch.float64, **config)
    graph = xl.attribute(*pair, TOKENS, tolerance=0.0)
    assert graph.sum_error() < 1e-9
    if kind == "topk":
        assert np.bincount(graph.arrays.layer_F).tolist() == [6 * (len(TOKENS) - 1)] * tiny.N_LAYERS


def test_float32_products_decide_which_features_fire():
    """Host and transcoder in bfloat16; products rounded to bfloat16 give other features."""
    host, clt = make_pair(dtype=torch.bfloat16, n_features=3000)
    local = local_model(host, clt, torch.tensor(TOKENS))
    coarse = 0
    for layer, active in enumerate(local.firing):
        x_TD, W_FD, b_F = local.host_pass.x_LTD[layer, 1:], clt.W_enc[layer], clt.b_enc[layer]
        fires = torch.nn.functional.linear(x_TD.float(), W_FD.float(), b_F.float()) > clt.threshold[layer].float()
        torch.testing.assert_close(
            torch.stack([active.token_K - 1, active.feature_K]), fires.nonzero().T, rtol=0, atol=0
        )
        coarse += int(((x_TD @ W_FD.T + b_F > clt.threshold[layer]) != fires).sum())
    assert coarse > 0


def test_token_vectors_are_the_embeddings_where_no_position_is_learned():
    for family in tiny.CONFIGS:
        host, clt = make_pair(family)
        embedding: Any = host.model.get_input_embeddings()
        scale = tiny.D_MODEL**0.5 if family.startswith("gemma") else 1.0
        token_TD = local_model(host, clt, torch.tensor(TOKENS)).host_pass.token_TD
        torch.testing.assert_close(token_TD, embedding.weight[TOKENS] * scale, msg=family)


def test_token_ids_are_stored_with_the_text_that_gives_them(pair: Pair):
    """Also if tokens split characters, and without the special token in front."""
    text = "def é 漢 return"
    ids = pair.host.encode(text)[0].tolist()
    graphs = [xl.attribute(*pair, prompt, tolerance=0.5).header for prompt in (text, ids, ids[1:])]
    assert [h.prompt for h in graphs] == [text, text, text]
    assert [h.tokens for h in graphs] == [ids, ids, ids[1:]]


def test_without_skipped_positions_every_position_has_features():
    pair = make_pair(dtype=torch.float64)
    pair.host.policy = xl.FirstPosition(prepend=False, n_skip=0)
    graph = xl.attribute(*pair, TOKENS, tolerance=0.0)
    assert (graph.arrays.position_F == 0).any()
    assert graph.sum_error() < 1e-9
    pair.host.policy = xl.FirstPosition(n_skip=3)
    graph = xl.attribute(*pair, TOKENS, tolerance=0.0, targets=["#5", "#4@1"])
    assert graph.arrays.position_F.min() == 3
    assert graph.sum_error() < 1e-9


def test_several_prompts_give_the_graphs_of_each(pair: Pair):
    prompts = [TOKENS, [tiny.N_VOCAB - 1, 40, 41, 5]]
    for one, two in zip([xl.attribute(*pair, t) for t in prompts], xl.attribute(*pair, prompts), strict=True):
        np.testing.assert_allclose(one.to_dense(), two.to_dense(), atol=1e-5)
        np.testing.assert_allclose(one.influence_N, two.influence_N, atol=1e-6)


LAYOUTS = [
    pytest.param(plan, padded, at_once, id=f"{plan.max_blocks}-{plan.together}-{padded}-{at_once}")
    for plan, padded, at_once in [
        (Plan(1, 1 << 14), True, 1 << 29),
        (Plan(2, 1 << 14), False, 1 << 29),
        (Plan(3, 100), True, 1 << 29),
        (Plan(32, 0), False, 1 << 29),
        (Plan(32, 1 << 14), True, 1),
    ]
]


@pytest.mark.parametrize(("plan", "padded", "at_once"), LAYOUTS)
@pytest.mark.parametrize("family", ["qwen3", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("cross_layer", [True, False])
def test_every_layout_gives_the_same_edges(
    family: str, cross_layer: bool, plan: Plan, padded: bool, at_once: int, monkeypatch: pytest.MonkeyPatch
):
    """Blocks of rows, layers that descend together, padded decoder rows, chunks."""
    pair = make_pair(family, dtype=torch.float64, cross_layer=cross_layer)
    targets = ["#5", "#7@3", "#11@0", Target(feature=_active(pair))]
    whole = xl.attribute(*pair, TOKENS, tolerance=0.0, targets=targets)
    monkeypatch.setattr(Plan, "of", lambda *_: plan)
    monkeypatch.setattr("crosslayer.attribution.sweep.BYTES_AT_ONCE", at_once)
    monkeypatch.setattr("crosslayer.attribution.writes.MAX_PADDED", 99 if padded else 0)
    other = xl.attribute(*pair, TOKENS, tolerance=0.0, targets=targets)
    np.testing.assert_allclose(other.to_dense(), whole.to_dense(), atol=1e-12)
    np.testing.assert_allclose(other.influence_N, whole.influence_N, atol=1e-12)
    for knobs in ({"tolerance": 0.1}, {"tolerance": 0.0, "max_nodes": 30}):
        part = xl.attribute(*pair, TOKENS, targets=targets, **knobs)
        rows = part.arrays.row_R
        assert part.unexpanded <= 0.1 or (rows < part.n_features).sum() == 30
        short = whole.influence_N - part.influence_N
        assert short.min() > -1e-9
        assert short[part.first_error :].sum() <= part.unexpanded * sum(t.weight for t in part.header.targets) + 1e-9
        if part.header.kept_share == 1:
            np.testing.assert_allclose(part.to_dense()[rows], whole.to_dense()[rows], atol=1e-12)


@pytest.mark.parametrize("family", list(tiny.CONFIGS))
def test_patterns_that_are_computed_again_give_the_same_graph(family: str, monkeypatch: pytest.MonkeyPatch):
    pair = make_pair(family)
    kept = xl.attribute(*pair, TOKENS, tolerance=0.0)
    edit = xl.Intervention(layer=1, index=int(kept.arrays.index_F[kept.arrays.layer_F == 1][0]), scale=0.0)
    effects = [xl.intervene(*pair, TOKENS, [[edit]], freeze="both").linear_after_BTV]
    monkeypatch.setattr("crosslayer.attribution.patterns.KEPT_SHARE", 0.0)
    again = xl.attribute(*pair, TOKENS, tolerance=0.0)
    effects.append(xl.intervene(*pair, TOKENS, [[edit]], freeze="both").linear_after_BTV)
    np.testing.assert_array_equal(again.to_dense(), kept.to_dense())
    torch.testing.assert_close(*effects, rtol=0, atol=0)


def _active(pair: Pair) -> tuple[int, int]:
    """Return a feature of a middle layer that is active at the last position."""
    local = local_model(*pair, torch.tensor(TOKENS))
    at = ((local.layers == 1) & (local.positions == len(TOKENS) - 1)).nonzero()[0][0]
    return 1, int(local.features.index_N[at])


def test_bfloat16_products_are_within_tolerance_of_the_row_max():
    pair = make_pair()
    exact, narrow = (xl.attribute(*pair, TOKENS, tolerance=0.0, precision=p).to_dense() for p in ("fp32", "bf16"))
    assert (np.abs(exact - narrow).max(1) <= 2e-2 * np.abs(exact).max(1) + 1e-9).all()


@pytest.mark.gpu
def test_gpu_matches_cpu(pair: Pair):
    cpu = xl.attribute(*pair, TOKENS, tolerance=0.0)
    pair.host.model.cuda()
    pair.clt.cuda()
    gpu = xl.attribute(*pair, TOKENS, tolerance=0.0)
    pair.host.model.cpu()
    pair.clt.cpu()
    scale = np.abs(cpu.to_dense()).max(1, keepdims=True)
    assert (np.abs(cpu.to_dense() - gpu.to_dense()) <= 1e-4 * scale + 1e-7).all()
