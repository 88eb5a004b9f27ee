"""Choosing tokens from logits [N, V] on a GPU without sorting them: statistics of blocks, then a look at one block.

What is computed is that of sampling.py and types.SamplingParams; weights are fp32 here, sums float64, so that a draw
differs from the float64 one only where u falls within about 1e-6 of a boundary between two tokens. Every result depends
on its own row only, and every sum has a fixed order. Nothing is allocated, and what a row needs is read from device
memory, so that a launch is the same whatever the rows are: it is captured in a CUDA graph as it stands.

    table.py       what the kernels know of a slot; every other file reads its rows' parameters there
    edits.py       a second copy of rows with logit_bias, penalties, bans or a grammar, edited
    stats.py       one pass over the logits: maximum, its id and the sum of weights of each block of 8,192, and the
                   maxima of 128 neighbours
    draw.py        greedy rows are done then; a plain draw finds its block from the sums and reads that one again: 1
                   1/16 passes in all
    truncation.py  rows with top_k, top_p or min_p
    logprobs.py    of the raw logits: log-sum-exp from the same statistics, and the best n found one by one
    record.py      what the next step must know of the tokens

Layouts: logits fp32 with contiguous rows; columns and tables contiguous. Rows of slot -1 are padding: nothing of theirs
is read or written. The files of this folder share the jit functions of table.py and weights.py.
"""
