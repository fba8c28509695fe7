"""Which parameters are perturbed, and how.

A parameter is perturbed by low-rank factors if it is a matrix (a linear layer, an embedding, a convolution kernel
read as ``(C_out, C_in * k * k)``, one expert of a mixture), and densely otherwise (EGGROLL section 4, "for vectors").
Patterns select by name: a plain word matches a whole dotted part of the name (``q_proj``) or a run of parts
(``self_attn.q_proj``); a pattern with ``*``, ``?`` or ``[`` is a glob over the whole name.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from eggroll.errors import ConfigError, SelectionError

Kind = Literal["matrix", "embedding", "conv", "experts", "vector", "other"]
"""What a parameter is: ``matrix`` ``(m, n)``; ``embedding`` ``(vocab, d)``, gathered by row; ``conv``
``(C_out, C_in/groups, *k)``; ``experts`` ``(E, m, n)``; ``vector`` 1-D (norm scales, biases); ``other`` the rest."""

KINDS: tuple[str, ...] = get_args(Kind)
PERTURBED_DTYPES = ("float64", "float32", "bfloat16", "float16")
LOW_RANK_KINDS = ("matrix", "embedding", "conv", "experts")


@dataclass(frozen=True)
class ParameterSpec:
    """A parameter as the noise sees it: name, shape and kind.

    ``dtype`` (a name such as ``uint8``; empty if it was not looked at) only says whether it can be perturbed at all.
    ``scale_groups`` above 0: a quantized matrix ``(m, n)`` is perturbed by its ``(m, scale_groups)`` scales, under an
    address of their own.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    dtype: str = field(default="", compare=False, repr=False)
    scale_groups: int = 0

    @property
    def can_be_perturbed(self) -> bool:
        """Whether real noise can be added: not to packed integers, complex numbers, or 8 bits and fewer."""
        return self.dtype in ("", *PERTURBED_DTYPES)

    @property
    def low_rank(self) -> bool:
        """Whether the perturbation is ``A B^T / sqrt(r)`` rather than dense."""
        return self.kind in LOW_RANK_KINDS

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(m, n)`` of the matrix that the factors make: of one expert, of the flattened kernel, or of the weight."""
        assert self.low_rank, f"{self.name} is perturbed densely"
        if self.scale_groups:
            return self.shape[0], self.scale_groups
        if self.kind == "experts":
            return self.shape[1], self.shape[2]
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """``(E,)`` for experts, ``()`` for everything else: factors have this shape in front."""
        return self.shape[:1] if self.kind == "experts" else ()

    @property
    def address(self) -> str:
        """The name that its noise is drawn under."""
        return f"{self.name}.scale" if self.scale_groups else self.name

    @property
    def estimate_shape(self) -> tuple[int, ...]:
        """Of the estimate: the parameter's, or that of its scales."""
        return self.matrix_shape if self.scale_groups else self.shape

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    def draw_size(self, rank: int) -> int:
        """Number of normals in one draw."""
        if not self.low_rank:
            return self.size
        m, n = self.matrix_shape
        return math.prod(self.batch_shape) * (m + n) * rank


def matches(name: str, pattern: str) -> bool:
    """Whether a parameter name is selected by a pattern (see the module's text)."""
    if any(character in pattern for character in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return f".{pattern.strip('.')}." in f".{name}."


def select(
    parameters: Iterable[ParameterSpec],
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    kinds: Sequence[str] = ("matrix", "conv", "experts"),
) -> list[ParameterSpec]:
    """The parameters to perturb, in the given order. Those of dtypes that cannot be perturbed are left alone.

    Args:
        parameters: all parameters of the model.
        include: name patterns. ``None`` takes every parameter of ``kinds``; with patterns, every parameter that
            one of them matches is taken, whatever its kind.
        exclude: name patterns of parameters that are left alone. They win over ``include``.
        kinds: the kinds that are taken when ``include`` is ``None``.

    Raises:
        SelectionError: a pattern matches nothing (the message lists near matches) or only parameters that cannot be
            perturbed, or nothing is left.
    """
    everything = list(parameters)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ConfigError(f"kinds has {unknown}; allowed are {list(KINDS)}")
    problems = []
    for label, patterns in (("target_modules", include or ()), ("exclude", exclude)):
        for pattern in patterns:
            matched = [spec for spec in everything if matches(spec.name, pattern)]
            if not matched:
                problems.append(f"{label} pattern {pattern!r} matches no parameter. {_suggest(pattern, everything)}")
            elif label == "target_modules" and not any(spec.can_be_perturbed for spec in matched):
                problems.append(
                    f"target_modules pattern {pattern!r} matches only parameters that cannot be perturbed: "
                    f"{matched[0].name} is {matched[0].dtype}, allowed are {', '.join(PERTURBED_DTYPES)}. Load the "
                    "model without quantization, or name other parameters"
                )
    if problems:
        raise SelectionError("; ".join(problems))
    chosen = [spec for spec in everything if asked_for(spec, include=include, exclude=exclude, kinds=kinds)]
    unfit, chosen = (
        [spec for spec in chosen if not spec.can_be_perturbed],
        [spec for spec in chosen if spec.can_be_perturbed],
    )
    if not chosen:
        present = sorted({spec.kind for spec in everything})
        raise SelectionError(
            f"nothing is left to perturb: kinds={list(kinds)}, target_modules={include and list(include)}, "
            f"exclude={list(exclude)}; the model has {len(everything)} parameters of the kinds {present}"
            + (f", {len(unfit)} of them of dtypes that cannot be perturbed ({unfit[0].dtype})" if unfit else "")
        )
    return chosen


def asked_for(
    spec: ParameterSpec, *, include: Sequence[str] | None, exclude: Sequence[str], kinds: Sequence[str]
) -> bool:
    """Whether patterns and kinds ask for a parameter (see :func:`select`), whether or not it can be perturbed."""
    if any(matches(spec.name, pattern) for pattern in exclude):
        return False
    return spec.kind in kinds if include is None else any(matches(spec.name, pattern) for pattern in include)


def _suggest(pattern: str, parameters: Sequence[ParameterSpec]) -> str:
    parts = {part for spec in parameters for part in spec.name.split(".") if not part.isdigit()}
    # The parts of the pattern that no name has are the ones to correct; "*.q_poj.*" and "self_attn.q_poj" alike.
    words = [word for word in pattern.replace("*", "").split(".") if word and word not in parts and not word.isdigit()]
    near: list[str] = []
    for word in words:
        near += difflib.get_close_matches(word, sorted(parts), n=4, cutoff=0.5)
        near += sorted(part for part in parts if word.lower() in part.lower() and part not in near)[:4]
    if near:
        return f"Near matches: {', '.join(dict.fromkeys(near))}"
    return f"Parts of names in this model: {', '.join(sorted(parts)[:12])}"
