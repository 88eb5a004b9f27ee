"""Layers: what a decoder is made of, on top of the operations table. Shapes use one legend everywhere:

    T  tokens of this rank in this step        E  experts
    S  sequences (rows)                        K  experts a token visits (top-k)
    D  hidden size                             I  intermediate size
    H  heads                                   W  ranks (world size)
    C  latent dim of the KV cache              X  rows received from peers
    N  head dim without position (nope)        P  pages
    R  head dim with position (rope)           B  tokens a page
    V  head dim of values (also: vocabulary)   L  tokens of the longest row, in whole pages

The step's tokens lie back to back in [T, ...]: first one for each decode row, then the prefill chunks.
"""
