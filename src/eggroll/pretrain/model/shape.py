"""The integer model's parameters: names, shapes, and what a perturbation of each is made of."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from eggroll.errors import ConfigError, ModelError

Kind = Literal["matrix", "embedding", "vector"]

MLP_FACTOR = 4
"""The hidden layer of the MLP is four times as wide as the model."""
MAX_VOCAB = 256
MAX_HIDDEN = 1 << 14
"""``4 D * 127 * 255`` has to be below 2^31: the sum of the MLP's second product, of bytes with an offset."""


@dataclass(frozen=True)
class Parameter:
    """One int8 array of the model.

    Attributes:
        name: as in the dict of parameters.
        shape: ``(m, n)`` of a matrix (outputs, inputs), ``(V, D)`` of the embedding, ``(D,)`` of a vector.
        kind: what it does.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind

    @property
    def outputs(self) -> int:
        """Length of the factor A: the features that come out (a vector's own length)."""
        return self.shape[-1] if self.kind == "embedding" else self.shape[0]

    @property
    def inputs(self) -> int:
        """Length of the factor B: the features that go in, the tokens of an embedding, a vector's own length."""
        return self.shape[0] if self.kind in ("embedding", "vector") else self.shape[1]

    def draw_length(self, rank: int) -> int:
        """Normals in one draw."""
        return rank * (self.inputs + self.outputs)


@dataclass(frozen=True)
class ModelShape:
    """The size of a model.

    Attributes:
        vocab: V, number of tokens, at most 256: a token is a byte.
        hidden: D, width.
        n_layers: L, blocks.
    """

    vocab: int = 256
    hidden: int = 256
    n_layers: int = 6

    def __post_init__(self) -> None:
        problems = []
        if not 1 <= self.vocab <= MAX_VOCAB:
            problems.append(
                f"vocab (={self.vocab}) must be 1 to {MAX_VOCAB}: tokens are bytes, and tables have 256 rows"
            )
        if not 1 <= self.hidden <= MAX_HIDDEN:
            problems.append(f"hidden (={self.hidden}) must be 1 to {MAX_HIDDEN}, so that int32 holds every sum")
        if self.n_layers < 1:
            problems.append(f"n_layers (={self.n_layers}) must be at least 1")
        if problems:
            raise ConfigError.from_problems("the model", problems)

    @functools.cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """All parameters in the order in which their dict holds them."""
        d, wide = self.hidden, MLP_FACTOR * self.hidden
        found = [Parameter("emb", (self.vocab, d), "embedding")]
        for i in range(self.n_layers):
            block = f"blocks.{i}"
            found.append(Parameter(f"{block}.ln1", (d,), "vector"))
            found += [Parameter(f"{block}.gru.{name}", (d, d), "matrix") for name in ("Wf", "Uf", "Wh", "Uh")]
            found += [Parameter(f"{block}.gru.{name}", (d,), "vector") for name in ("bf", "bh")]
            found.append(Parameter(f"{block}.ln2", (d,), "vector"))
            found.append(Parameter(f"{block}.mlp.up", (wide, d), "matrix"))
            found.append(Parameter(f"{block}.mlp.down", (d, wide), "matrix"))
        found.append(Parameter("ln_out", (d,), "vector"))
        found.append(Parameter("head", (self.vocab, d), "matrix"))
        return tuple(found)

    @property
    def size(self) -> int:
        """Number of parameters: ``(2 V + 1) D + L (4 D + 12 D^2)``."""
        return (2 * self.vocab + 1) * self.hidden + self.n_layers * (4 * self.hidden + 12 * self.hidden**2)

    @property
    def macs(self) -> int:
        """Multiply-adds of the blocks' products per token, without head and low-rank parts: ``12 L D^2``."""
        return 12 * self.n_layers * self.hidden**2

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> ModelShape:
        """The shape of a dict of parameters, all of which are checked.

        Raises:
            ModelError: a parameter is missing, unknown, or has another shape than the rest implies.
        """
        if "emb" not in params or len(params["emb"].shape) != 2:
            raise ModelError("parameters of an integer model need 'emb', an int8 array of shape (V, D)")
        vocab, hidden = (int(size) for size in params["emb"].shape)
        n_layers = sum(name.endswith(".ln1") for name in params)
        try:
            shape = cls(vocab, hidden, n_layers)
        except ConfigError as error:
            raise ModelError(f"parameters do not make a model: {error}") from None
        expected = {parameter.name: parameter.shape for parameter in shape.parameters}
        found = {name: tuple(int(size) for size in value.shape) for name, value in params.items()}
        floats = [name for name, value in params.items() if str(value.dtype).rpartition(".")[2] != "int8"]
        if floats:
            raise ModelError(f"parameters must be int8; {', '.join(floats[:4])} are {params[floats[0]].dtype}")
        wrong = [
            f"{name}: {found.get(name, 'missing')}, expected {expected.get(name, 'no such parameter')}"
            for name in dict.fromkeys([*expected, *found])
            if found.get(name) != expected.get(name)
        ]
        if wrong:
            listed = "; ".join(wrong[:8])
            raise ModelError(f"parameters do not make a model of {n_layers} layers x {hidden}: {listed}")
        return shape
