"""A graph of circuit-tracer 0.5.0 on a tiny Qwen3 and CLT (`scripts/make_golden.py`): ours has the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import crosslayer as xl
from pairs import make_pair

GOLDEN = Path(__file__).parent / "golden" / "circuit_tracer_0.5.0.npz"


def test_edges_activations_and_influence_are_those_of_circuit_tracer():
    with np.load(GOLDEN) as golden:
        pair = make_pair("qwen3")
        for part, module in (("host", pair.host.model), ("clt", pair.clt)):
            names = [name for name in golden.files if name.startswith(f"{part}/")]
            module.load_state_dict({name[len(part) + 1 :]: torch.from_numpy(golden[name]) for name in names})
        graph = xl.attribute(*pair, golden["tokens"].tolist(), tolerance=0.0)
        a, targets = graph.arrays, graph.header.targets
        selected = golden["active_features"][golden["selected_features"]]
        assert len(selected) > 200
        assert np.array_equal(selected, np.stack([a.layer_F, a.position_F, a.index_F], axis=1))
        np.testing.assert_allclose(a.activation_F, golden["activation_values"], rtol=1e-5)
        assert [t.token for t in targets] == golden["logit_tokens"].tolist()
        np.testing.assert_allclose([t.probability for t in targets], golden["logit_probabilities"], rtol=1e-4)
        expected = golden["adjacency"]
        largest = np.abs(expected).max(axis=1, keepdims=True)
        assert (np.abs(graph.to_dense() - expected) <= 1e-5 * largest).all()
        influence = golden["influence"]
        np.testing.assert_allclose(graph.arrays.influence_N, influence, rtol=1e-4, atol=1e-5 * influence.max())
