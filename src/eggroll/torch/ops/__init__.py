"""What torch functions do with population values: one module per family of functions, whose rules are in one table."""

from eggroll.torch.ops import (  # noqa: F401  (importing a module registers its rules)
    attention,
    convolution,
    dispatch,
    elementwise,
    norms,
    products,
    recurrent,
    routed_rules,
)
