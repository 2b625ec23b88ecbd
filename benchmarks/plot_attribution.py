"""Plot the results of `bench_attribution.py --cost`: time and memory against prompt length and L0.

python benchmarks/plot_attribution.py benchmarks/results/attribution-cost-2-cores.json docs/attribution-cost.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "crosslayer"
import matplotlib.pyplot as plt  # noqa: E402

LAYERS, SKIPPED = 28, 1


def main() -> None:
    measured = json.loads(Path(sys.argv[1]).read_text())
    results = measured["results"]
    by_length = [r for r in results if "500 nodes" in r["case"]]
    by_l0 = [r for r in results if "500 nodes" not in r["case"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    left.loglog([r["tokens"] for r in by_length], [r["seconds"] for r in by_length], "o-")
    left.set(xlabel="tokens of the prompt", ylabel="seconds", title="500 nodes, total L0 of about 110")
    l0 = [r["active"] / (r["tokens"] - SKIPPED) for r in by_l0]
    right.loglog(l0, [r["seconds"] for r in by_l0], "o-")
    for x, r in zip(l0, by_l0, strict=True):
        right.annotate(
            f"{r['rows']:,} rows", (x, r["seconds"]), textcoords="offset points", xytext=(-8, 6), ha="right", fontsize=8
        )
    right.set(xlabel="L0 summed over layers", ylabel="seconds", title="10 tokens, 2 % of influence left")
    for axes, at in ((left, [r["tokens"] for r in by_length]), (right, l0)):
        axes.grid(True, which="major", alpha=0.25)
        axes.set_xticks(at, [f"{x:,.0f}" for x in at])
        axes.set_yticks([5, 10, 20, 40, 60], ["5", "10", "20", "40", "60"])
        axes.minorticks_off()
        axes.set_ylim(4, 80)
        axes.margins(x=0.12)
    figure.suptitle(
        f"28 x 20,480 features of width 1024, bfloat16 products, {measured['machine']['threads']} cores", fontsize=10
    )
    figure.savefig(sys.argv[2], metadata={"Date": None})


if __name__ == "__main__":
    main()
