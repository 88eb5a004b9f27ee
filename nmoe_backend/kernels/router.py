"""Group-limited top-k routing with sigmoid scores (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

score = sigmoid(logit). The choice is made on score + bias: a group counts as the sum of its two best, the best
`topk_groups` groups stay, the others become -inf, and the `top_k` best experts of what is left are taken. Weights are
the scores without the bias, renormalised over the chosen and scaled. All in fp32. Ties go to the lowest index, of
groups and of experts: a plain top-k leaves them open, and a router that answers differently from run to run cannot be
tested.
"""

from __future__ import annotations

from torch import Tensor


def router_reference(
    logits: Tensor, bias: Tensor, top_k: int, num_groups: int, topk_groups: int, renormalize: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """logits [T, E] fp32, bias [E] fp32 -> expert ids [T, K] int64, best first, and weights [T, K] fp32."""
    scores = logits.sigmoid()
    choice = scores + bias
    if num_groups > 1:
        grouped = choice.unflatten(-1, (num_groups, -1))  # [T, G, E / G]
        group_scores = grouped.topk(2, dim=-1).values.sum(-1)
        dropped = group_scores.sort(dim=-1, descending=True, stable=True).indices[:, topk_groups:]
        mask = group_scores.new_zeros(group_scores.shape).scatter_(1, dropped, float("-inf"))
        choice = (grouped + mask.unsqueeze(-1)).flatten(1)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * scale
