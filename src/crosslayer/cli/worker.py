"""`crosslayer worker` (hidden): runs jobs of the page in a separate process; JSON Lines on stdin and stdout."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click


class Worker:
    """Runs jobs; caches the host and the transcoder of the last job."""

    def __init__(self) -> None:
        self.name, self.model = "", None

    def opened(self, clt: str, tell: Any) -> Any:
        from crosslayer.clt.open import load_clt
        from crosslayer.eval.replacement_model import ReplacementModel, host_of
        from crosslayer.host.host import choose_device

        if self.model is None or self.name != clt:
            tell(stage="loading the model")
            device = choose_device("auto")
            opened = load_clt(clt, device=device)
            self.name, self.model = clt, ReplacementModel(host_of(opened, device=device), opened)
        return self.model

    def trace(self, job: dict[str, Any], tell: Any) -> dict[str, Any]:
        from crosslayer.attribution.attribute import attribute

        model = self.opened(job["clt"], tell)
        tell(stage="tracing")
        graph = attribute(
            model,
            None,
            job["prompt"],
            targets=job["targets"] or None,
            tolerance=job["tolerance"],
            max_nodes=job["max_nodes"],
        )
        out = Path(job["out"])
        out.parent.mkdir(exist_ok=True)
        return {"path": str(graph.save(out)), "features": graph.n_features}

    def intervene(self, job: dict[str, Any], tell: Any) -> dict[str, Any]:
        from crosslayer.attribution.interventions import Intervention, Watch, intervene

        model = self.opened(job["clt"], tell)
        tell(stage="running")
        changes = [
            Intervention(layer=c["layer"], index=c["index"], positions=c["position"], set=c["set"], scale=c["scale"])
            for c in job["changes"]
        ]
        watch = [Watch(w["layer"], w["position"], w["index"]) for w in job["watch"]]
        r = intervene(model, None, job["tokens"], changes, freeze=job["freeze"], watch=watch)
        before_V, after_V = r.before_TV[-1].float().softmax(0), r.after_BTV[0, -1].float().softmax(0)
        chosen = dict.fromkeys(before_V.topk(10).indices.tolist() + after_V.topk(10).indices.tolist())
        tokens = [
            {"token": model.host.decode_token(t), "before": float(before_V[t]), "after": float(after_V[t])}
            for t in chosen
        ]
        watched = [
            {
                "node": w["node"],
                "predicted": w["predicted"],
                "measured": float(after - before),
                "activation": w["activation"],
            }
            for w, before, after in zip(job["watch"], r.watched_before_K, r.watched_BK[0], strict=True)
        ]
        return {"tokens": sorted(tokens, key=lambda t: -t["before"]), "watched": watched}

    def activations(self, job: dict[str, Any], tell: Any) -> dict[str, Any]:
        from crosslayer.features.prompt import active_features

        model = self.opened(job["clt"], tell)
        tell(stage="running")
        n_features = model.clt.config.n_features
        if job["layer"] is None:
            tokens, active = active_features(model, job["text"], job["top"])
            rows = [[[f // n_features, f % n_features, v] for f, v in some] for some in active]
            return {"tokens": tokens, "active": rows}
        found = model.features(job["text"])
        layer_K, position_K, index_K = found.indices()
        here = (layer_K == job["layer"]) & (index_K == job["index"])
        values = [0.0] * found.shape[1]
        for p, v in zip(position_K[here].tolist(), found.values()[here].tolist(), strict=True):
            values[p] = v
        return {
            "tokens": [model.host.decode_token(t) for t in model.tokens(job["text"])[0].tolist()],
            "activations": values,
        }


@click.command(hidden=True)
def command() -> None:
    """Run jobs from standard input, one JSON object per line."""
    from crosslayer.core.errors import CrosslayerError

    # Output of libraries must not mix with the answers.
    answers, sys.stdout = sys.stdout, sys.stderr
    worker = Worker()
    for line in sys.stdin:
        job = json.loads(line)

        def tell(number: int = job["job"], **fields: Any) -> None:
            answers.write(json.dumps({"job": number, **fields}) + "\n")
            answers.flush()

        try:
            tell(state="done", result=getattr(worker, job["kind"])(job, tell))
        except CrosslayerError as error:
            tell(state="failed", error=str(error))
        except (RuntimeError, MemoryError) as error:
            # PyTorch raises RuntimeError when out of memory; drop the loaded model and continue.
            worker = Worker()
            tell(
                state="failed",
                error=(f"the model failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"),
            )
