"""The alphabet of shapes: one letter an axis, in jaxtyping strings, in suffixes of names, and in einsum strings.

`W_enc_FD` is (features, width); `Float[Tensor, "B L D"]` is a batch of tokens at every layer.
"""

AXES = {
    "B": "tokens of a batch, or rows of one where T follows",
    "T": "positions of a sequence",
    "L": "layer read",
    "M": "layer written",
    "F": "features of a layer",
    "D": "width of the residual stream",
    "V": "vocabulary",
    "N": "nodes of a graph",
    "H": "attention heads",
    "G": "heads of attention's values, each shared by H / G heads",
    "E": "width of an attention head; edges of a graph",
    "R": "rows of a graph: the nodes whose incoming edges are known",
    "S": "slots of a decoder: the layers that one layer's features write to",
    "C": "sources of a group of targets",
    "J": "tokens at the first positions of the policy, and the constant",
    "X": "a width that the signature alone fixes",
    "Y": "another such",
    "R1": "rows and one more",
    "K": "active features, as listed by a sparse encoding",
}
