"""RMSNorm: y = weight * cast(x * rsqrt(mean(x^2) + eps)).

The mean is taken in fp32 and the weight is multiplied after the cast back to x's dtype, as in DeepSeek's and Hugging
Face's code: in bf16 the other order rounds differently.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[..., D], [D] -> [..., D] in x's dtype."""
    normed = F.rms_norm(x.float(), weight.shape, weight=None, eps=eps)
    return normed.to(x.dtype) * weight
