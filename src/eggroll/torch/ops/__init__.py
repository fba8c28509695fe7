"""What torch functions do with population values: one module per family of functions."""

from eggroll.torch.ops import attention, convolution, elementwise, norms, products, recurrent
from eggroll.torch.ops.registry import RULES, dispatch, per_member, rule

__all__ = [
    "RULES",
    "attention",
    "convolution",
    "dispatch",
    "elementwise",
    "norms",
    "per_member",
    "products",
    "recurrent",
    "rule",
]
