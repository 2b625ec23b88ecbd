"""Every value of a bundle equals a brute-force computation on the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from crosslayer.bundles.index import Index
from crosslayer.bundles.settings import log_edges
from crosslayer.features import direct
from crosslayer.features.sketch import hash_of
from made_bundle import CONTEXT, N_FEATURES, SETTINGS, Made
from pairs import make_pair


def test_counts_histograms_and_densities(made: Made):
    f = made.activations()
    bundle = made.bundle
    assert bundle.manifest.n_tokens == f.shape[0] * (CONTEXT - 1)
    assert not f[:, :, N_FEATURES + 5].any()
    for n in range(f.shape[2]):
        fired = f[:, :, n][f[:, :, n] > 0]
        feature = bundle.feature(*bundle.place(n))
        assert feature.count == len(fired)
        assert feature.density == pytest.approx(len(fired) / bundle.manifest.n_tokens, abs=0)
        assert feature.log.edges == log_edges()
        inside = np.clip(fired, log_edges()[0], np.nextafter(log_edges()[-1], 0, dtype=np.float32))
        np.testing.assert_array_equal(feature.log.counts, np.histogram(inside, log_edges())[0])
        if not len(fired):
            assert (feature.label, feature.examples) == ("dead: did not fire", [])
            continue
        assert (feature.min, feature.max) == (fired.min(), fired.max())
        assert feature.mean == pytest.approx(fired.astype(np.float64).mean(), rel=2**-23, abs=2**-20)
        top = feature.linear.edges[-1]
        assert top / 2 <= fired.max() < top
        np.testing.assert_array_equal(feature.linear.counts, np.histogram(fired, feature.linear.edges)[0])


def peaks_of(f_BT: np.ndarray) -> list[tuple[float, int]]:
    """Return (value, position) of the first maximum of each row on which the feature fires, in descending order."""
    rows = f_BT.max(1).nonzero()[0]
    found = [(float(f_BT[r].max()), int(r * CONTEXT + f_BT[r].argmax())) for r in rows]
    return sorted(found, key=lambda p: (-p[0], p[1]))


def test_top_activations_are_the_highest_peaks_one_per_row(made: Made):
    f = made.activations()
    for n in range(f.shape[2]):
        examples = [e for e in made.bundle.examples(n) if e.bin == 0]
        found = [(e.value, e.position + e.peak) for e in examples]
        assert found == peaks_of(f[:, :, n])[: SETTINGS.n_top]


def test_examples_hold_their_window_with_8_bit_activations(made: Made):
    f = made.activations()
    flat, tokens = f.reshape(-1, f.shape[2]), made.rows_BT.reshape(-1)
    for n in range(f.shape[2]):
        for e in made.bundle.examples(n):
            span = slice(e.position, e.position + SETTINGS.window)
            row = (e.position + e.peak) // CONTEXT
            assert row * CONTEXT <= e.position <= (row + 1) * CONTEXT - SETTINGS.window
            assert e.tokens == [made.host.decode_token(t) for t in tokens[span].tolist()]
            step = flat[:, n].max() / 255
            exact = flat[span, n]
            assert np.all(np.array(e.activations) >= exact - 1e-6)
            assert np.all(np.array(e.activations) < exact + step * 1.001)
            assert [a > 0 for a in e.activations] == (exact > 0).tolist()


def test_samples_are_uniform_within_each_bin(made: Made):
    f = made.activations()
    for n in range(f.shape[2]):
        peaks = peaks_of(f[:, :, n])
        position = torch.tensor([p for _, p in peaks], dtype=torch.int64)
        chance = dict(zip(position.tolist(), hash_of(torch.full_like(position, n), position).tolist(), strict=True))
        drawn = sorted(peaks, key=lambda p: chance[p[1]])[: SETTINGS.n_reservoir]
        ascending = sorted(drawn, key=lambda p: (p[0], -p[1]))
        bins = {p: 1 + i * SETTINGS.n_quantiles // len(drawn) for i, p in enumerate(ascending)}
        top = set(peaks[: SETTINGS.n_top])
        wanted = set()
        for b in range(1, SETTINGS.n_quantiles + 1):
            members = sorted((p for p in drawn if bins[p] == b and p not in top), key=lambda p: chance[p[1]])
            wanted |= {(b, p) for p in members[: SETTINGS.per_quantile]}
        feature = made.bundle.feature(*made.bundle.place(n))
        sampled = [e for e in feature.examples if e.bin]
        assert {(e.bin, (e.value, e.position + e.peak)) for e in sampled} == wanted
        for e in sampled:
            assert feature.quantile_edges[e.bin - 1] <= e.value <= feature.quantile_edges[e.bin]


def test_tokens_at_peaks_and_around_them(made: Made):
    f = made.activations()
    flat, tokens = f.reshape(-1, f.shape[2]), made.rows_BT.reshape(-1)
    for n in (0, 10, N_FEATURES + 3, 2 * N_FEATURES + 7):
        peaks = peaks_of(f[:, :, n])
        position = torch.tensor([p for _, p in peaks], dtype=torch.int64)
        order = hash_of(torch.full_like(position, n), position).argsort()[: SETTINGS.n_reservoir]
        counted = {place: list[int]() for place in ("peak", "before", "first", "last")}
        for p in position[order].tolist():
            start = min(max(p - SETTINGS.before, p - p % CONTEXT), p - p % CONTEXT + CONTEXT - SETTINGS.window)
            first = last = p
            while first > start and flat[first - 1, n] > 0:
                first -= 1
            while last < start + SETTINGS.window - 1 and flat[last + 1, n] > 0:
                last += 1
            for place, at in (("peak", p), ("before", p - 1), ("first", first), ("last", last)):
                counted[place].append(int(tokens[at]))
        found = made.bundle.feature(*made.bundle.place(n)).at
        for place, ids in counted.items():
            best = sorted({t: ids.count(t) for t in ids}.items(), key=lambda p: (-p[1], p[0]))[:5]
            assert found[place] == [(made.host.decode_token(t), c) for t, c in best]


def test_coactivation(made: Made):
    fires = (made.activations().reshape(-1, made.bundle.n_layers * N_FEATURES) > 0).astype(np.int64)
    together = fires.T @ fires
    alone = together.diagonal().copy()
    assert made.bundle.manifest.sample_tokens == made.bundle.manifest.n_tokens
    np.fill_diagonal(together, 0)
    cosine = together / np.sqrt(np.maximum(np.outer(alone, alone), 1))
    for n in range(len(alone)):
        own = range(n // N_FEATURES * N_FEATURES, (n // N_FEATURES + 1) * N_FEATURES)
        wanted = {}
        for side in (list(own), [i for i in range(len(alone)) if i not in own]):
            some = sorted((i for i in side if together[n, i]), key=lambda i: (-cosine[n, i], i))
            wanted |= {made.bundle.place(i): cosine[n, i] for i in some[: SETTINGS.n_coactive]}
        found = made.bundle.neighbours(*made.bundle.place(n), "coactivation")
        assert {(x.layer, x.index): pytest.approx(x.value) for x in found} == wanted


def written_and_read(made: Made) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (N, L, D) writes per layer, and (N, D) read directions, with the norm's gain."""
    n_layers, d = made.clt.config.n_layers, made.clt.config.d_model
    writes = torch.zeros(n_layers * N_FEATURES, n_layers, d)
    reads = []
    for i in range(n_layers):
        writes[i * N_FEATURES : (i + 1) * N_FEATURES, i:] = made.clt.W_dec[i]
        norm = made.host.layers[i].post_attention_layernorm
        reads.append(made.clt.W_enc[i] * norm.weight)
    return writes, torch.cat(reads)


def test_logits_norms_neighbours_and_virtual_weights(made: Made):
    writes, reads = written_and_read(made)
    model, bundle = made.host.model, made.bundle
    logits = (writes.sum(1) * model.model.norm.weight) @ model.lm_head.weight.T  # type: ignore[operator,union-attr]
    logits = logits[:, : len(made.host.tokenizer)]
    mean, std = logits.mean(1, keepdim=True), logits.std(1, keepdim=True, correction=0)
    encoder = torch.cat(list(made.clt.W_enc))
    for n in range(len(logits)):
        f = bundle.feature(*bundle.place(n))
        for side, sign in ((f.promotes, 1), (f.suppresses, -1)):
            value, index = (sign * logits[n]).topk(SETTINGS.n_logits)
            assert [x.token for x in side] == [made.host.decode_token(t) for t in index.tolist()]
            torch.testing.assert_close(torch.tensor([x.value for x in side]), sign * value, rtol=1e-4, atol=1e-5)
            z = (sign * value - mean[n]) / std[n]
            torch.testing.assert_close(torch.tensor([x.z for x in side]), z, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.tensor(f.decoder_norms), writes[n].norm(dim=1), rtol=1e-5, atol=1e-6)
        for by, vectors in (("encoder", encoder), ("decoder", writes.sum(1))):
            cosine = torch.nn.functional.cosine_similarity(vectors[n], vectors, dim=1)
            cosine[n] = -2
            value, index = cosine.topk(SETTINGS.n_neighbours)
            found = bundle.neighbours(*bundle.place(n), by)
            assert [(x.layer, x.index) for x in found] == [bundle.place(i) for i in index.tolist()]
            torch.testing.assert_close(torch.tensor([x.value for x in found]), value, rtol=1e-3, atol=1e-3)
        check_virtual(made, n, writes, reads)


def check_virtual(made: Made, n: int, writes: torch.Tensor, reads: torch.Tensor) -> None:
    bundle, layer = made.bundle, n // N_FEATURES
    weight = torch.zeros(len(reads))
    for m in range(len(reads)):
        other = m // N_FEATURES
        if other < layer:
            weight[m] = writes[m, :layer].sum(0) @ reads[n]
        elif other > layer:
            weight[m] = writes[n, :other].sum(0) @ reads[m]
    for by, side in (
        ("upstream", range(layer * N_FEATURES)),
        ("downstream", range((layer + 1) * N_FEATURES, len(reads))),
    ):
        wanted = sorted(side, key=lambda m: -abs(float(weight[m])))[: SETTINGS.n_virtual]
        found = bundle.neighbours(*bundle.place(n), by)
        assert [(x.layer, x.index) for x in found] == [bundle.place(m) for m in wanted]
        torch.testing.assert_close(torch.tensor([x.value for x in found]), weight[wanted], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2", "gpt_neox"])
@pytest.mark.parametrize(
    "hooks",
    [("mlp.hook_in", "mlp.hook_out"), ("hook_resid_mid", "hook_mlp_out"), ("ln2.hook_normalized", "mlp.hook_out")],
)
def test_virtual_weights_are_gradients_through_the_norms(family: str, hooks: tuple[str, str]):
    """Compare with gradients from a feature's write to another's pre-activation, with every norm scale held at 1."""
    if family == "gpt_neox" and hooks[0] == "hook_resid_mid":
        pytest.skip("parallel blocks have no hook_resid_mid")
    pair = make_pair(family, hooks=hooks, n_features=6)
    wiring = direct.Wiring(pair.host, pair.clt, pair.host.n_vocab)
    found = direct.virtual_weights(wiring, 12)
    anatomy = wiring.anatomy
    one = torch.ones(1)

    def without_bias(norm, x: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros_like(x)
        return norm.apply(x, one) - norm.apply(zero, one)

    for layer in range(1, 3):
        for source in range(layer):
            for i in range(6):
                stream = torch.zeros(1, pair.host.d_model)
                for m in range(source, layer):
                    row = pair.clt.W_dec[source][i, m - source][None]
                    after = anatomy.blocks[m].after_mlp_norm
                    stream = stream + (without_bias(after, row) if after and hooks[1] == "mlp.hook_out" else row)
                block = anatomy.blocks[layer]
                read_norm = block.mlp_norm if hooks[0] == "mlp.hook_in" else block.mlp_norm.plain()
                read = stream if hooks[0] == "hook_resid_mid" else without_bias(read_norm, stream)
                weights = (read @ pair.clt.W_enc[layer].T)[0]
                for t in range(6):
                    at = (found.upstream.id[layer * 6 + t] == source * 6 + i).nonzero()
                    assert len(at) == 1
                    value = found.upstream.value[layer * 6 + t, at[0, 0]]
                    torch.testing.assert_close(value, weights[t], rtol=1e-4, atol=1e-5)


def test_reach_and_ranks(made: Made):
    index: Index = made.bundle.index
    writes, _ = written_and_read(made)
    share = writes.square().sum(-1).sort(dim=1, descending=True).values
    share = share.cumsum(1) / share.sum(1, keepdim=True)
    reach = ((share < 0.9).sum(1) + 1).tolist()
    assert [index.metrics(n)["reach"] for n in range(len(reach))] == reach
    auroc = [
        index.metrics(n)["auroc"] or 0.0 for n in index.page("rank", descending=False, limit=99, offset=0, filters={})
    ]
    assert auroc == sorted(auroc, reverse=True)
