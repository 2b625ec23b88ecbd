r"""Cross-layer transcoders: train, measure, save and open them; trace prompts and intervene; see what features mean.

    import crosslayer as xl

    host = xl.load_host("stdlib-qwen3")
    clt = xl.load_clt("runs/quickstart").clt
    trained = xl.train(xl.RECIPES["stdlib"](), "runs/mine")
    evaluation = xl.evaluate("runs/mine", text=["stdlib"])
    graph = xl.attribute(host, "runs/mine", "def area(self):\n    return self.")
    feature = xl.load_features("runs/quickstart").feature(3, 1241)

Names are loaded when first used (PEP 562), so that `import crosslayer` is quick and imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "CLT": "crosslayer.clt.transcoder",
    "CLTConfig": "crosslayer.clt.config",
    "CrosslayerError": "crosslayer.core.errors",
    "Evaluation": "crosslayer.schemas.evaluation",
    "FirstPosition": "crosslayer.schemas.policy",
    "Host": "crosslayer.host.host",
    "Intervention": "crosslayer.attribution.interventions",
    "RECIPES": "crosslayer.training.recipes",
    "Graph": "crosslayer.graphs.graph",
    "ReplacementModel": "crosslayer.eval.replacement_model",
    "Target": "crosslayer.attribution.targets",
    "TrainConfig": "crosslayer.training.config",
    "attribute": "crosslayer.attribution.attribute",
    "evaluate": "crosslayer.eval.api",
    "intervene": "crosslayer.attribution.interventions",
    "load_clt": "crosslayer.clt.open",
    "load_features": "crosslayer.bundles.bundle",
    "load_host": "crosslayer.host.host",
    "train": "crosslayer.training.trainer",
    "validate": "crosslayer.attribution.validate",
}

__all__ = [
    "CLT",
    "RECIPES",
    "CLTConfig",
    "CrosslayerError",
    "Evaluation",
    "FirstPosition",
    "Graph",
    "Host",
    "Intervention",
    "ReplacementModel",
    "Target",
    "TrainConfig",
    "__version__",
    "attribute",
    "evaluate",
    "intervene",
    "load_clt",
    "load_features",
    "load_host",
    "train",
    "validate",
]

if TYPE_CHECKING:
    from crosslayer.attribution.attribute import attribute as attribute
    from crosslayer.attribution.interventions import Intervention as Intervention
    from crosslayer.attribution.interventions import intervene as intervene
    from crosslayer.attribution.targets import Target as Target
    from crosslayer.attribution.validate import validate as validate
    from crosslayer.bundles.bundle import load_features as load_features
    from crosslayer.clt.config import CLTConfig as CLTConfig
    from crosslayer.clt.open import load_clt as load_clt
    from crosslayer.clt.transcoder import CLT as CLT
    from crosslayer.core.errors import CrosslayerError as CrosslayerError
    from crosslayer.eval.api import evaluate as evaluate
    from crosslayer.eval.replacement_model import ReplacementModel as ReplacementModel
    from crosslayer.graphs.graph import Graph as Graph
    from crosslayer.host.host import Host as Host
    from crosslayer.host.host import load_host as load_host
    from crosslayer.schemas.evaluation import Evaluation as Evaluation
    from crosslayer.schemas.policy import FirstPosition as FirstPosition
    from crosslayer.training.config import TrainConfig as TrainConfig
    from crosslayer.training.recipes import RECIPES as RECIPES
    from crosslayer.training.trainer import train as train


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'crosslayer' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
