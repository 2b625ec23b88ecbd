"""ReLU: f = max(z, 0)."""

from __future__ import annotations

from crosslayer.clt.activations.activation import Activation

# Too much passes zero for candidates in lower precision to pay.
RELU = Activation(name="relu", published=True, coarse=False)
