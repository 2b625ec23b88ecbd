"""Compare CLT and PLT with the same host, text, steps, parameter count and L0 over several seeds, in one table.

    python scripts/compare_clt_plt.py --out DIR --seeds 0 1 2

Both use the `stdlib` recipe. The PLT has as many features per layer as make its parameter count equal to the CLT's.
Existing runs are read, not trained again.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console

import crosslayer as xl
from crosslayer.schemas.evaluation import Evaluation
from crosslayer.schemas.run import RunManifest
from crosslayer.training.plan import budget_of
from crosslayer.training.settings import by_budget
from crosslayer.training.setup import shape_of


def equal_parameters(clt: xl.CLTConfig) -> int:
    """Compute the features per layer at which a per-layer transcoder has as many parameters as `clt`."""
    per_feature = (
        replace(clt, cross_layer=False, n_features=2).n_parameters
        - replace(clt, cross_layer=False, n_features=1).n_parameters
    )
    fixed = replace(clt, cross_layer=False, n_features=1).n_parameters - per_feature
    return round((clt.n_parameters - fixed) / per_feature)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, help="overrides the recipe's tokens")
    args = parser.parse_args()
    host = xl.load_host("stdlib-qwen3")
    recipe = xl.RECIPES["stdlib"]()
    if args.tokens:
        recipe = replace(recipe, tokens=args.tokens)
    # Both with the settings that the budget gives the CLT.
    recipe, _ = by_budget(recipe, budget_of(recipe, shape_of(host)))
    n_plt = equal_parameters(recipe.clt(host.n_layers, host.d_model))
    kinds = {"CLT": recipe, "PLT": replace(recipe, cross_layer=False, n_features=n_plt)}
    found: dict[str, list[Evaluation]] = {kind: [] for kind in kinds}
    parameters: dict[str, int] = {}
    for seed in args.seeds:
        for kind, config in kinds.items():
            run = args.out / f"{kind.lower()}-{seed}"
            if not (run / "eval.json").exists():
                xl.train(replace(config, seed=seed), run, console=Console(stderr=True))
            found[kind].append(Evaluation.model_validate_json((run / "eval.json").read_text()))
            manifest = RunManifest.model_validate_json((run / "run.json").read_text())
            parameters[kind] = manifest.clt["n_parameters"]
    print(f"{recipe.tokens:,} tokens, seeds {args.seeds}; mean ± standard deviation over seeds\n")
    print("| | features per layer | parameters | L0 per layer | FVU | loss recovered | KL |")
    print("|---|---|---|---|---|---|---|")
    for kind, es in found.items():
        metrics = [
            [e.l0_per_layer for e in es],
            [e.fvu for e in es],
            [e.replacement.loss_recovered for e in es],
            [e.replacement.kl for e in es],
        ]
        cells = [f"{mean(v):.4f} ± {stdev(v) if len(v) > 1 else 0:.4f}" for v in metrics]
        print(f"| {kind} | {kinds[kind].n_features:,} | {parameters[kind]:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
