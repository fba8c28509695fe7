"""What torch functions do with population values: one module per family of functions."""

from eggroll.torch.ops import attention, convolution, elementwise, norms, products, recurrent
from eggroll.torch.ops.dispatch import dispatch
from eggroll.torch.ops.per_member import per_member
from eggroll.torch.ops.registry import RULES, rule

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
