"""Axis letters, used in jaxtyping strings, suffixes of names, and einsum strings.

`W_enc_FD` is (features, width); `Float[Tensor, "B L D"]` is a batch of tokens at every layer.
"""

AXES = {
    "B": "tokens of a batch, or its rows if T follows",
    "T": "positions of a sequence",
    "L": "layer read",
    "M": "layer written",
    "F": "features of a layer",
    "D": "width of the residual stream",
    "V": "vocabulary",
    "N": "nodes of a graph",
    "H": "attention heads",
    "G": "key-value heads, each shared by H / G attention heads",
    "E": "width of an attention head; edges of a graph",
    "R": "rows of a graph: nodes whose incoming edges are computed",
    "S": "decoder slots: layers that a layer's features write to",
    "C": "sources of a group of targets",
    "J": "tokens at the policy's first positions, and the constant",
    "X": "any size, local to a signature",
    "Y": "another size, local to a signature",
    "R1": "rows + 1",
    "K": "active entries of a sparse encoding",
}
