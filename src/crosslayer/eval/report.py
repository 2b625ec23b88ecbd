"""Printed metrics, warnings, and the model card."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from crosslayer.clt.config import CLTConfig, Provenance
from crosslayer.schemas.evaluation import Evaluation

OFF = 0.1
"""Relative deviation from the L0 asked that is a warning."""


def warnings_of(e: Evaluation) -> list[str]:
    """Return what is wrong with a transcoder or its training, one sentence each with the remedy."""
    warnings = []
    if e.affine_fvu is not None and not e.fvu < e.affine_fvu:
        warnings.append(
            f"FVU {e.fvu:.4f} is not below {e.affine_fvu:.4f}, that of an affine map without features: train on more"
            " --tokens, with another --lr, or with a higher --l0-per-layer"
        )
    t = e.training
    if t is None:
        return warnings
    if t.l0_training is not None and _off(t.l0_training, t.l0_asked):
        warnings.append(
            f"L0 {t.l0_training:.1f} at the end of training is {t.l0_training / t.l0_asked:.2f} times the"
            f" {t.l0_asked:.1f} asked: train on more --tokens, or change --l0-ramp or --lr"
        )
    if t.l0_uncalibrated is not None and _off(t.l0_uncalibrated, t.l0_asked):
        warnings.append(
            f"calibration moved the L0 from {t.l0_uncalibrated:.1f}, {t.l0_uncalibrated / t.l0_asked:.2f} times the"
            f" {t.l0_asked:.1f} asked, so the weights were trained for another L0 than they have: train on more"
            " --tokens, or change --l0-ramp or --lr"
        )
    if _off(e.l0, t.l0_asked):
        warnings.append(
            f"L0 {e.l0:.1f} on held-out text is {e.l0 / t.l0_asked:.2f} times the {t.l0_asked:.1f} asked: raise"
            " --calibration-tokens or --eval-tokens if they are few; on text unlike that of training it differs"
        )
    return warnings


def _off(l0: float, asked: float) -> bool:
    return not abs(l0 - asked) <= OFF * asked


def _change(l0: float, asked: float) -> str:
    return f"{l0 / asked - 1:+.1%}"


def summary(e: Evaluation) -> Iterator[tuple[str, str, bool | None]]:
    """Yield a transcoder's main figures as name, value and whether it is as it should be; None where none is due."""
    t, n_layers = e.training, len(e.l0_L)
    if t is not None:
        yield "L0 asked", f"{t.l0_asked:.1f} ({t.l0_asked / n_layers:.2f} per layer)", None
        for name, l0 in (("L0 in training, at the end", t.l0_training), ("L0 before calibration", t.l0_uncalibrated)):
            if l0 is not None:
                yield name, f"{l0:.1f} ({_change(l0, t.l0_asked)})", not _off(l0, t.l0_asked)
        if t.l0_uncalibrated is None and t.trained_as != "relu":
            yield "calibration", f"converted from {t.trained_as} to JumpReLU", None
        yield "L0 held out", f"{e.l0:.1f} ({_change(e.l0, t.l0_asked)})", not _off(e.l0, t.l0_asked)
    else:
        yield "L0", f"{e.l0:.1f} ({e.l0_per_layer:.2f} per layer)", None
    yield "FVU", f"{e.fvu:.4f}", None if e.affine_fvu is None else e.fvu < e.affine_fvu
    yield "FVU of an affine map", "not measured" if e.affine_fvu is None else f"{e.affine_fvu:.4f}", None
    yield "dead features", f"{e.dead_share:.1%}", None
    if e.massive_share is not None:
        yield "massive activations, left out", f"{e.massive_share:.2%} of tokens", None
    if e.massive_share and e.fvu_all is not None and e.l0_all is not None:
        yield "with them", f"FVU {e.fvu_all:.4f}, L0 {e.l0_all:.1f}", None


def print_end(console: Console, e: Evaluation) -> None:
    """Print the main figures, green or red if they are judged, and the warnings."""
    table = Table(title="Summary", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value, good in summary(e):
        table.add_row(name, Text(value, style={None: "", True: "green", False: "bold red"}[good]))
    console.print(table)
    for warning in warnings_of(e):
        console.print(f"[bold red]WARNING[/] [yellow]{escape(warning)}[/]", highlight=False)


def print_table(console: Console, e: Evaluation) -> None:
    """Print metrics per layer, those of the replacement model, and last the summary with its warnings."""
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
    print_end(console, e)


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
    figures = "\n".join(f"| {name} | {value} |" for name, value, _ in summary(e))
    warnings = "".join(f"> **Warning:** {warning}.\n\n" for warning in warnings_of(e))
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

{warnings}| | |
|---|---|
{figures}

L0 is the number of active features per token, summed over layers. FVU is the fraction of variance unexplained, \
relative to each layer's mean
over these tokens, pooled in normalised units; the affine map is the best one without features, from each MLP's own \
input to its output, fitted
on training text. Dead features are those without activation on {e.dead_tokens:,} tokens. Massive activations are \
tokens whose norm at some layer
exceeds 10 times the median.

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
