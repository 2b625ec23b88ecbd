"""ReLU: f = max(z, 0)."""

from __future__ import annotations

from crosslayer.clt.activations.activation import Activation

# Too many entries exceed zero for a search in lower precision to be faster.
RELU = Activation(name="relu", published=True, coarse=False)
