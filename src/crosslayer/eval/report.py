"""The measures as people read them: a table on the terminal, and the model card of the transcoder's folder."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from crosslayer.clt.config import CLTConfig, Provenance
from crosslayer.schemas.evaluation import Evaluation


def print_table(console: Console, e: Evaluation) -> None:
    """By layer, then over all, then the replacement model beside the host."""
    table = Table(title=f"On {e.n_tokens:,} held-out tokens of {', '.join(e.sources)}", title_justify="left")
    for name in ("layer", "FVU", "L0", "dead"):
        table.add_column(name, justify="right")
    for i, (fvu, l0, dead) in enumerate(zip(e.fvu_L, e.l0_L, e.dead_L, strict=True)):
        table.add_row(str(i), f"{fvu:.4f}", f"{l0:.2f}", f"{dead:.1%}")
    table.add_section()
    table.add_row("all", f"{e.fvu:.4f}", f"{e.l0:.1f} ({e.l0_per_layer:.2f} a layer)", f"{e.dead_share:.1%}")
    console.print(table)
    r = e.replacement
    table = Table(title=f"The replacement model, on {r.n_tokens:,} of them", title_justify="left")
    for name in ("", "cross-entropy (nats)", "KL(host || it)", "top-1 agreement", "loss recovered"):
        table.add_column(name, justify="right")
    table.add_row("host", f"{r.ce_host:.4f}", "0", "100.0%", "100.0%")
    table.add_row(
        "replacement", f"{r.ce_replaced:.4f}", f"{r.kl:.4f}", f"{r.top1_agreement:.1%}", f"{r.loss_recovered:.1%}"
    )
    table.add_row("MLPs at zero", f"{r.ce_zero:.4f}", "", "", "0.0%")
    console.print(table)


def model_card(config: CLTConfig, p: Provenance, e: Evaluation, trained: dict[str, str]) -> str:
    """`README.md` of a published folder; every figure comes from `e` and the config.

    Args:
        trained: rows about the training, such as tokens and sources, by name.
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

A {kind} for `{p.model_name}`: it replaces the model's MLPs by sparse features. Each reads the input of one layer's \
MLP and
writes to the outputs of {"that MLP and of all later ones" if config.cross_layer else "that MLP"}.

| | |
|---|---|
| layers × features | {config.n_layers} × {config.n_features:,} |
| width | {config.d_model:,} |
| parameters | {config.n_parameters:,} |
| activation | {config.activation} |
| reads, writes | `{p.input_hook}`, `{p.output_hook}` |
| affine skip | {"yes" if config.skip else "no"} |
| first position | {"a special token is put in front; " if p.policy.prepend else ""}the first {p.policy.n_skip} \
without features |
{training}

## Measures

On {e.n_tokens:,} held-out tokens of {", ".join(e.sources)}, none of them trained on.

| L0 a token, all layers | L0 a layer | FVU | dead (of {e.dead_tokens:,} tokens) |
|---|---|---|---|
| {e.l0:.1f} | {e.l0_per_layer:.2f} | {e.fvu:.4f} | {e.dead_share:.1%} |

FVU is the fraction of variance unexplained, each layer against its own mean over these tokens, pooled in normalised \
units.

| layer | FVU | L0 | dead |
|---|---|---|---|
{layers}

With every MLP replaced, features recomputed on the replaced stream ({r.n_tokens:,} tokens):

| | cross-entropy (nats) | KL(model ‖ replacement) | top-1 agreement | loss recovered |
|---|---|---|---|---|
| the model | {r.ce_host:.4f} | | | |
| replaced | {r.ce_replaced:.4f} | {r.kl:.4f} | {r.top1_agreement:.1%} | {r.loss_recovered:.1%} |
| MLPs at zero | {r.ce_zero:.4f} | | | |

## Use

```python
import crosslayer as xl

model = xl.ReplacementModel.from_pretrained("{p.model_name}", "path/of/this/folder")
features = model.features("import os")  # sparse (layers, tokens, features)
logits = model.logits("import os")  # with every MLP replaced
```

It opens in circuit-tracer as well: give it the absolute path of this folder.

## Format

`config.yaml` and, for each layer i, `W_enc_i.safetensors` (`W_enc_i` (F, D), `b_enc_i`, \
`b_dec_i`{", `threshold_i`" if config.kind.thresholds else ""}{", `W_skip_i`" if config.skip else ""})
and `W_dec_i.safetensors` (`W_dec_i` (F, n_layers - i, D); slot j writes to layer i + j). Weights take the model's own
activations: normalisation is folded in.
"""
