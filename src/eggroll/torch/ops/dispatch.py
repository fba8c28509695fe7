"""What happens to a torch function some of whose arguments are values: its rule, its metadata, or once per member."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from eggroll.torch.ops import routed, shared
from eggroll.torch.ops.arguments import bind
from eggroll.torch.ops.per_member import into_given, per_member
from eggroll.torch.ops.registry import METADATA, RULES
from eggroll.torch.ops.routed import RoutedRows
from eggroll.torch.ops.scaled import SCALED_RULES
from eggroll.torch.ops.shared import SharedRows
from eggroll.torch.perturbed import set_handler
from eggroll.torch.scaled import ScaledWeight


def dispatch(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a torch function some of whose arguments are values."""
    if kwargs:
        args, kwargs = bind(func, args, kwargs)
        if kwargs.get("out") is not None:
            return into_given(func, args, kwargs)
    rules = RULES
    for arg in (*args, *kwargs.values()):
        if type(arg) is RoutedRows or (isinstance(arg, (list, tuple)) and any(type(x) is RoutedRows for x in arg)):
            return routed.apply(func, args, kwargs)
        if type(arg) is ScaledWeight:
            rules = SCALED_RULES
            break
        if type(arg) is SharedRows or (isinstance(arg, (list, tuple)) and any(type(x) is SharedRows for x in arg)):
            return shared.apply(func, args, kwargs)
    implementation = rules.get(func)
    if implementation is not None:
        result = implementation(*args, **kwargs)
        if result is not NotImplemented:
            return result
    if func in METADATA:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    return per_member(func, args, kwargs)


set_handler(dispatch)
