"""Activation functions, one file each; to add one, write its file and add it to `ACTIVATIONS`.

The registry does not import torch, so settings and `--help` load fast; methods on tensors import it when called.
"""

from __future__ import annotations

from crosslayer.clt.activations.activation import Activation
from crosslayer.clt.activations.batchtopk import BATCHTOPK
from crosslayer.clt.activations.jumprelu import JUMPRELU
from crosslayer.clt.activations.relu import RELU
from crosslayer.clt.activations.topk import TOPK

ACTIVATIONS: dict[str, Activation] = {a.name: a for a in (JUMPRELU, RELU, TOPK, BATCHTOPK)}

__all__ = ["ACTIVATIONS", "BATCHTOPK", "JUMPRELU", "RELU", "TOPK", "Activation"]
