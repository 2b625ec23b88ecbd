"""Activation functions, one file each. To add one, write its file and put it into `ACTIVATIONS`.

The registry needs no torch, so that settings and `--help` know the activations at once; tensors come with their own
methods.
"""

from __future__ import annotations

from crosslayer.clt.activations.activation import Activation
from crosslayer.clt.activations.batchtopk import BATCHTOPK
from crosslayer.clt.activations.jumprelu import JUMPRELU
from crosslayer.clt.activations.relu import RELU
from crosslayer.clt.activations.topk import TOPK

ACTIVATIONS: dict[str, Activation] = {a.name: a for a in (JUMPRELU, RELU, TOPK, BATCHTOPK)}

__all__ = ["ACTIVATIONS", "BATCHTOPK", "JUMPRELU", "RELU", "TOPK", "Activation"]
