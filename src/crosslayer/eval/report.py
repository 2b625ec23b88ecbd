"""Printed table of the metrics, and the model card."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from crosslayer.clt.config import CLTConfig, Provenance
from crosslayer.schemas.evaluation import Evaluation


def print_table(console: Console, e: Evaluation) -> None:
    """Print metrics per layer and in total, then those of the replacement model."""
    table = Table(title=f"On {e.n_tokens:,} held-out tokens of {', '.join(e.sources)}", title_justify="left")
    for name in ("layer", "FVU", "L0", "dead"):
        table.add_column(name, justify="right")
    for i, (fvu, l0, dead) in enumerate(zip(e.fvu_L, e.l0_L, e.dead_L, strict=True)):
        table.add_row(str(i), f"{fvu:.4f}", f"{l0:.2f}", f"{dead:.1%}")
    table.add_section()
    table.add_row("all", f"{e.fvu:.4f}", f"{e.l0:.1f} ({e.l0_per_layer:.2f} per layer)", f"{e.dead_share:.1%}")
    console.print(table)
    r = e.replacement
    table = Table(title=f"Replacement model, on {r.n_tokens:,} of these tokens", title_justify="left")
    for name in ("", "cross-entropy (nats)", "KL(host || replacement)", "top-1 agreement", "loss recovered"):
        table.add_column(name, justify="right")
    table.add_row("host", f"{r.ce_host:.4f}", "0", "100.0%", "100.0%")
    table.add_row(
        "replacement", f"{r.ce_replaced:.4f}", f"{r.kl:.4f}", f"{r.top1_agreement:.1%}", f"{r.loss_recovered:.1%}"
    )
    table.add_row("zero-ablated MLPs", f"{r.ce_zero:.4f}", "", "", "0.0%")
    console.print(table)


def model_card(config: CLTConfig, p: Provenance, e: Evaluation, trained: dict[str, str]) -> str:
    """Return `README.md` for a transcoder folder; all values come from `e` and the config.

    Args:
        trained: extra rows about training, such as tokens and sources, by name.
    """
    kind = "cross-layer transcoder (CLT)" if config.cross_layer else "per-layer transcoder (PLT)"
    r = e.replacement
    layers = "\n".join(
        f"| {i} | {fvu:.4f} | {l0:.2f} | {dead:.1%} |"
        for i, (fvu, l0, dead) in enumerate(zip(e.fvu_L, e.l0_L, e.dead_L, strict=True))
    )
    training = "\n".join(f"| {name} | {value} |" for name, value in trained.items())
    return f"""---
library_name: crosslayer
tags: [{"cross-layer-transcoder" if config.cross_layer else "transcoder"}, interpretability, circuit-tracer]
base_model: {p.model_name}
---

# {p.scan}

A {kind} for `{p.model_name}`: it replaces the model's MLPs with sparse features. Each feature \
reads the input of one layer's MLP and
writes to the outputs of {"that MLP and of all later ones" if config.cross_layer else "that MLP"}.

| | |
|---|---|
| layers × features | {config.n_layers} × {config.n_features:,} |
| width | {config.d_model:,} |
| parameters | {config.n_parameters:,} |
| activation | {config.activation} |
| reads, writes | `{p.input_hook}`, `{p.output_hook}` |
| affine skip | {"yes" if config.skip else "no"} |
| first position | {"special token prepended; " if p.policy.prepend else ""}first {p.policy.n_skip} \
without features |
{training}

## Evaluation

On {e.n_tokens:,} held-out tokens of {", ".join(e.sources)}, none of which were used in training.

| L0 per token, all layers | L0 per layer | FVU | dead (of {e.dead_tokens:,} tokens) |
|---|---|---|---|
| {e.l0:.1f} | {e.l0_per_layer:.2f} | {e.fvu:.4f} | {e.dead_share:.1%} |

FVU is the fraction of variance unexplained, relative to each layer's mean over these tokens, pooled in normalised \
units.

| layer | FVU | L0 | dead |
|---|---|---|---|
{layers}

With every MLP replaced and features recomputed on the replaced residual stream ({r.n_tokens:,} tokens):

| | cross-entropy (nats) | KL(model ‖ replacement) | top-1 agreement | loss recovered |
|---|---|---|---|---|
| the model | {r.ce_host:.4f} | | | |
| replaced | {r.ce_replaced:.4f} | {r.kl:.4f} | {r.top1_agreement:.1%} | {r.loss_recovered:.1%} |
| zero-ablated MLPs | {r.ce_zero:.4f} | | | |

## Use

```python
import crosslayer as xl

model = xl.ReplacementModel.from_pretrained("{p.model_name}", "path/of/this/folder")
features = model.features("import os")  # sparse (layers, tokens, features)
logits = model.logits("import os")  # with every MLP replaced
```

circuit-tracer loads it too, by the absolute path of this folder.

## Format

`config.yaml` and, for each layer i, `W_enc_i.safetensors` (`W_enc_i` (F, D), `b_enc_i`, \
`b_dec_i`{", `threshold_i`" if config.kind.thresholds else ""}{", `W_skip_i`" if config.skip else ""})
and `W_dec_i.safetensors` (`W_dec_i` (F, n_layers - i, D); slot j writes to layer i + j). Normalisation is folded into
the weights, which read the model's activations directly.
"""
