"""A language model's outline: its dimensions and parameters, known without its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from eggroll.core.select import ParameterSpec, select
from eggroll.llm.config import EggrollConfig
from eggroll.llm.models.loading import load_skeleton
from eggroll.torch.parameters import parameter_specs
from eggroll.torch.quantized.adopt import grids
from eggroll.torch.quantized.grid import Bits

KINDS = ("matrix", "embedding", "head", "conv", "experts", "vector", "other")
"""Kinds of parameters in the order in which they are shown; ``head`` is an output head that is not tied."""


@dataclass(frozen=True)
class Outline:
    """What counting needs to know about a model.

    Attributes:
        name: the class of the model.
        specs: all parameters, tied ones once.
        head: names of the parameters of an output head of its own (empty if it is tied, or if there is none).
        tied: whether the embedding is the output head too.
        layers, width, inner, vocabulary: number of blocks, size of the hidden states, of the inner layer, and of the
            vocabulary.
        heads, kv_heads, head_size: of the attention; all 0 without one.
        gated: whether the inner layer has a gate (a third matrix).
        scores: whether attention writes its ``(time, time)`` scores to memory.
        experts, experts_per_token: of a mixture of experts; both 0 without one.
        state: float32 entries of a row's recurrent state in one layer, which takes the place of keys and values; 0
            without one.
        carried: what else one layer carries from token to token for a row, in entries of the weights' dtype.
        bits: of quantized parameters, bits per entry of their codes and of their scales, by name.
    """

    name: str
    specs: tuple[ParameterSpec, ...]
    head: tuple[str, ...]
    tied: bool
    layers: int
    width: int
    inner: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_size: int
    gated: bool
    scores: bool
    experts: int
    experts_per_token: int
    state: int = 0
    bits: Mapping[str, Bits] = field(default_factory=dict)
    carried: int = 0

    @classmethod
    def of(cls, model: Any) -> Outline:
        """The outline of a model, on whatever device (``meta`` included)."""
        config = model.config
        config = config.get_text_config() if hasattr(config, "get_text_config") else config

        def number(*names: str, default: int = 0) -> int:
            values = (getattr(config, name, None) for name in names)
            return next((int(value) for value in values if isinstance(value, int) and value), default)

        width = number("hidden_size", "n_embd", "d_model", default=512)
        heads = number("num_attention_heads", "n_head", "num_heads")
        head_size = number("head_dim", "d_kv", default=width // heads if heads else 0)
        specs = tuple(parameter_specs(model))
        experts = number("num_local_experts", "num_experts", "n_routed_experts")
        inner = number("intermediate_size", "n_inner", "d_ff", "ffn_dim", default=4 * width)
        head = separate_head(model)
        return cls(
            name=type(model).__name__,
            specs=specs,
            head=head,
            tied=not head and _output_head(model) is not None,
            layers=number("num_hidden_layers", "n_layer", "num_layers", default=1),
            width=width,
            inner=number("moe_intermediate_size", default=inner) if experts else inner,
            vocabulary=number("vocab_size", default=1),
            heads=heads,
            kv_heads=number("num_key_value_heads", default=heads),
            head_size=head_size,
            gated=any("gate_proj" in spec.name or "gate_up" in spec.name for spec in specs),
            scores=getattr(config, "_attn_implementation", None) == "eager",
            experts=experts,
            experts_per_token=number("num_experts_per_tok", "num_experts_per_token", default=1) if experts else 0,
            state=getattr(model, "state_size", 0),
            bits=getattr(model, "code_bits", None) or _bits_of(model),
            carried=getattr(model, "carried_size", 0),
        )

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(spec.size for spec in self.specs)

    def state_bytes(self, element: int) -> int:
        """Bytes of a row's recurrent state in all layers, after however many tokens; ``element``: of a weight."""
        return self.layers * (4 * self.state + element * self.carried)

    def kind(self, spec: ParameterSpec) -> str:
        """The kind under which a parameter is counted."""
        return "head" if spec.name in self.head else spec.kind

    def counts(self, specs: Sequence[ParameterSpec] | None = None) -> dict[str, tuple[int, int]]:
        """Tensors and entries by kind, of all parameters or of some; kinds that do not occur are left out."""
        found: dict[str, tuple[int, int]] = {}
        for spec in self.specs if specs is None else specs:
            tensors, entries = found.get(self.kind(spec), (0, 0))
            found[self.kind(spec)] = (tensors + 1, entries + spec.size)
        return {kind: found[kind] for kind in KINDS if kind in found}

    def evolved(self, config: EggrollConfig) -> list[ParameterSpec]:
        """The parameters that a run with these settings evolves.

        Raises:
            SelectionError: a pattern matches nothing.
        """
        exclude = exclude_of(config, self.head)
        return select(self.specs, include=config.target_modules, exclude=exclude, kinds=config.kinds)


@dataclass(frozen=True)
class Found:
    """A model that was looked up and not loaded: its outline, and what it would be loaded as."""

    outline: Outline
    name: str
    dtype: torch.dtype
    device: torch.device
    notes: tuple[str, ...] = ()


def look_up(source: str, **settings: Any) -> Found:
    """The outline of a model without its weights; arguments and errors are those of :func:`eggroll.llm.load`."""
    found = load_skeleton(source, **settings)
    return Found(Outline.of(found.model), found.name, found.dtype, found.device, found.notes)


def separate_head(model: Any) -> tuple[str, ...]:
    """The name of an output head that is a parameter of its own (not tied to the embedding)."""
    weight = _output_head(model)
    if weight is None:
        return ()
    inputs = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if getattr(inputs, "weight", None) is weight:
        return ()
    return tuple(name for name, parameter in model.named_parameters() if parameter is weight)


def exclude_of(config: EggrollConfig, head: tuple[str, ...]) -> tuple[str, ...]:
    """The patterns of parameters that are left alone: an output head of its own too, unless it was asked for."""
    return config.exclude if config.target_modules is not None or config.head else (*config.exclude, *head)


def _bits_of(model: Any) -> dict[str, Bits]:
    return {name: grid.bits for name, grid in grids(model).items()}


def _output_head(model: Any) -> Any:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return getattr(head, "weight", None)
