"""Where the population sits in a plain tensor that meets a value.

A plain tensor is an activation that holds the members in its leading dimension (``rows``, R = P * batch, or a multiple
of R where other dimensions were flattened in), in its second one (``time_major``), or something that is the same for
all members (``shared``: a buffer, positions, a learned query). Sizes mostly tell these apart. Where they do not (a
sequence exactly as long as there are rows), the following decide, in this order:

1. what the same use of the same parameter met before (``context.layouts``). The first call of a model under a
   population is preceded by one with a few rows, of a number that no other dimension shares
   (:mod:`eggroll.torch.layout.probe`);
2. where the tensor's memory comes from: an input of the model holds rows, a parameter or buffer does not;
3. the promise that inputs carry the members in front, for activations of R rows.

What is left raises: a guess could be silently wrong.
"""

from __future__ import annotations

from torch import Tensor

from eggroll.errors import UnsupportedOperationError
from eggroll.torch.perturbed import Layout, MemberContext, Use


def layout_of(context: MemberContext, name: str, use: str, x: Tensor, feature_dims: int = 1) -> Layout:
    """Where the population sits in an activation whose last ``feature_dims`` dimensions cannot hold it."""
    free = x.ndim - feature_dims
    if free < 1:
        return "shared"
    size = x.shape[0]
    key = (name, use, x.ndim)
    known = context.layouts.get(key)
    leading = context.is_rows(size)
    if leading and known == "rows":
        return "rows"
    if is_constant(context, x):
        # The same for all members; one that was expanded over the batch has rows all the same.
        return "rows" if leading and x.stride(0) == 0 else learn_constant(context, key)
    if leading and known == "rows_or_constant":
        return "rows"
    second = free >= 2 and context.rows is not None and x.shape[1] == context.rows and context.rows > 1
    if second and known == "time_major":
        return "time_major"
    if known == "shared":
        return "shared"
    if not leading and not second:
        return learn(context, key, "shared")
    if context.trusting:
        return learn(context, key, "rows" if leading else "time_major")
    if leading and second:
        if context.batch_dim == 1:
            return "time_major"
        if known is None and size == context.rows:
            return "rows"
    elif known is None and (leading or context.batch_dim == 1):
        return learn(context, key, "rows" if leading else "time_major")
    raise ambiguous(context, name, use, x)


def layout_of_ids(context: MemberContext, name: str, ids: Tensor) -> Layout:
    """Where the population sits in integers that index a parameter, ``(R, ...)``, ``(T, R)`` or without it."""
    if ids.ndim == 0:
        return "shared"
    size = ids.shape[0]
    key = (name, "ids", ids.ndim)
    known = context.layouts.get(key)
    leading = context.is_rows(size)
    second = ids.ndim >= 2 and context.rows is not None and ids.shape[1] == context.rows
    if not leading and not second:
        return learn(context, key, "shared")
    if is_input(context, ids):
        if leading and second:
            return "time_major" if context.batch_dim == 1 else "rows"
        return learn(context, key, "rows" if leading else "time_major")
    if leading and known == "rows":
        return "rows"
    if second and known == "time_major":
        return "time_major"
    if known == "shared" or is_constant(context, ids):
        # One row of a buffer that was expanded over the batch has rows; other buffers do not.
        return "rows" if leading and known != "shared" and ids.stride(0) == 0 else "shared"
    if context.trusting:
        return learn(context, key, "rows" if leading else "time_major")
    if known in (None, "rows_or_constant") and leading and ids.ndim >= 2 and ids.shape[1] != size:
        return learn(context, key, "rows")
    raise ambiguous(context, name, "ids", ids)


def layout_in_broadcast(context: MemberContext, name: str, x: Tensor, value_shape: tuple[int, ...]) -> Layout:
    """Where the population sits in a tensor that is broadcast with a value of a shape (as the model sees it)."""
    missing = x.ndim - len(value_shape)
    if missing > 0 and x.shape[0] == context.rows and context.layouts.get((name, "elementwise", x.ndim)) == "rows":
        return "rows"
    if x.ndim == 0 or missing < 0:
        return "shared"
    free = missing
    while free < x.ndim and value_shape[free - missing] == 1:
        free += 1
    if free >= 1:
        return layout_of(context, name, "elementwise", x, x.ndim - free)
    # The leading dimensions meet: a member's part of the rows has to broadcast with the value, or they are not rows.
    if context.layouts.get((name, "elementwise", x.ndim)) == "shared" or is_constant(context, x):
        return "shared"
    leading = context.is_rows(x.shape[0])
    assert context.members is not None
    if x.shape[0] != value_shape[0]:
        return "rows" if leading and x.shape[0] // context.members in (1, value_shape[0]) else "shared"
    if x.ndim < 3 or value_shape[1] != 1:
        return "shared"
    return in_second(context, (name, "second", x.ndim), x)


def in_second(context: MemberContext, use: Use, x: Tensor) -> Layout:
    """Whether a tensor, whose leading dimension is a parameter's, has rows in its second one (``time_major``)."""
    known = context.layouts.get(use)
    if context.rows is None or not context.is_rows(x.shape[1]) or x.shape[1] <= 1:
        return learn(context, use, "shared")
    if known == "shared":
        return "shared"
    if known == "mixed" or (known is None and x.shape[1] != context.rows and not context.trusting):
        raise ambiguous(context, use[0], use[1], x)
    return learn(context, use, "time_major")


def is_constant(context: MemberContext, x: Tensor) -> bool:
    """Whether a tensor is (a view of) a parameter or buffer of the model, and so the same for all members."""
    return bool(context.constants) and address(x) in context.constants


def is_input(context: MemberContext, x: Tensor) -> bool:
    """Whether a tensor is (a view of) an input of the running call; outside of calls, everything is."""
    return context.inputs is None or address(x) in context.inputs


def address(x: Tensor) -> int:
    """Where a tensor's memory starts; 0 if it has none of its own."""
    try:
        return x.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0  # no storage of its own (inside torch.vmap, for example)


def learn(context: MemberContext, use: Use, layout: Layout) -> Layout:
    """Remember the layout of a use; one that varies is remembered as mixed."""
    before = context.layouts.setdefault(use, layout)
    if before != layout and (before, layout) != ("rows_or_constant", "rows"):
        context.layouts[use] = "mixed"
    return layout


def learn_constant(context: MemberContext, use: Use) -> Layout:
    """Remember that a use met a constant of the model, which has to be told from rows by its memory."""
    if context.layouts.get(use, "rows") == "rows":
        context.layouts[use] = "rows_or_constant"
    return "shared"


def ambiguous(context: MemberContext, name: str, use: str, x: Tensor) -> UnsupportedOperationError:
    """The error for a tensor in which the members cannot be found."""
    what = "indexed by integers" if use == "ids" else "used with a tensor"
    return UnsupportedOperationError(
        f"parameter {name!r} is {what} of shape {tuple(x.shape)}, made inside the model, and with {context.rows} rows "
        "its sizes do not tell whether it holds the members. Another batch size or sequence length may; or leave the "
        f'parameter alone (exclude=[{name!r}]), or evaluate one member at a time (mode="loop").'
    )
