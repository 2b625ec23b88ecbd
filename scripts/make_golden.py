# pyright: reportMissingImports=false
"""Compute an attribution graph with circuit-tracer, to compare ours with in the tests.

    python scripts/make_golden.py          # in an environment with circuit-tracer 0.5.0, TransformerLens and crosslayer

Writes `tests/attribution/golden/circuit_tracer_0.5.0.npz`: the weights of a tiny Qwen3 and of a CLT, a prompt, and what
circuit-tracer finds on it, all features expanded: active features (layer, position, index), their activations, the
adjacency (row = target, column = source; features, errors by layer and position, tokens, logits), the tokens of the
logits and their probabilities, and the influence of each node.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from pairs import TOKENS, make_pair  # noqa: E402

OUT = ROOT / "tests" / "attribution" / "golden" / "circuit_tracer_0.5.0.npz"


def replacement_model(host: Any, clt: Any) -> Any:
    """Return circuit-tracer's model with the same weights."""
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.qwen3 import convert_qwen3_weights

    c, theirs = host.model.config, clt.config
    config = HookedTransformerConfig(
        n_layers=c.num_hidden_layers,
        d_model=c.hidden_size,
        n_ctx=c.max_position_embeddings,
        d_head=c.head_dim,
        n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads,
        d_mlp=c.intermediate_size,
        d_vocab=c.vocab_size,
        act_fn="silu",
        eps=c.rms_norm_eps,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=c.head_dim,
        rotary_base=int(getattr(c, "rope_theta", None) or c.rope_parameters["rope_theta"]),
        final_rms=True,
        gated_mlp=True,
        use_qk_norm=True,
        original_architecture="Qwen3ForCausalLM",
        model_name="tiny",
        device="cpu",
        dtype=torch.float32,
    )
    transcoder = CrossLayerTranscoder(
        theirs.n_layers,
        theirs.n_features,
        theirs.d_model,
        activation_function="jump_relu",
        lazy_decoder=False,
        feature_input_hook="mlp.hook_in",
        feature_output_hook="mlp.hook_out",
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    with torch.no_grad():
        transcoder.W_enc.copy_(torch.stack(list(clt.W_enc)))
        transcoder.b_enc.copy_(torch.stack(list(clt.b_enc)))
        transcoder.b_dec.copy_(torch.stack(list(clt.b_dec)))
        transcoder.activation_function.threshold.copy_(torch.stack(list(clt.threshold))[:, None])
        for mine, ours in zip(transcoder.W_dec, clt.W_dec, strict=True):
            mine.copy_(ours)
    model = TransformerLensReplacementModel.from_config(config, transcoder, tokenizer=host.tokenizer)
    weights = convert_qwen3_weights(host.model, model.cfg)
    there = model.state_dict()
    # circuit-tracer wraps the MLPs and the unembedding.
    wrapped = {
        name: name.replace(".mlp.", ".mlp.old_mlp.").replace("unembed.", "unembed.old_unembed.") for name in weights
    }
    named = {name if name in there else wrapped[name]: tensor for name, tensor in weights.items()}
    unexpected = model.load_state_dict(named, strict=False).unexpected_keys
    assert not unexpected, unexpected
    return model


def main() -> None:
    from circuit_tracer import attribute
    from circuit_tracer.graph import compute_node_influence

    host, clt = make_pair("qwen3")
    model = replacement_model(host, clt)
    tokens = torch.tensor(TOKENS)
    ours, theirs = host.run(tokens[None]), model(tokens[None], return_type="logits").detach()
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4), (ours - theirs).abs().max()
    graph = attribute(tokens, model, max_n_logits=10, desired_logit_prob=0.95, max_feature_nodes=None)
    n_logits = len(graph.logit_targets)
    weight_N = torch.zeros(len(graph.adjacency_matrix))
    weight_N[-n_logits:] = graph.logit_probabilities
    influence_N = compute_node_influence(graph.adjacency_matrix, weight_N)
    OUT.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        OUT,
        tokens=np.array(TOKENS),
        active_features=graph.active_features.numpy().astype(np.int16),
        selected_features=graph.selected_features.numpy().astype(np.int16),
        activation_values=graph.activation_values.detach().numpy(),
        adjacency=graph.adjacency_matrix.numpy(),
        logit_tokens=np.array([t.vocab_idx for t in graph.logit_targets]),
        logit_probabilities=graph.logit_probabilities.numpy(),
        influence=influence_N.numpy(),
        **{f"host/{name}": t.numpy() for name, t in host.model.state_dict().items()},
        **{f"clt/{name}": t.numpy() for name, t in clt.state_dict().items()},
    )
    print(f"{OUT}: {len(graph.active_features)} features, {OUT.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
