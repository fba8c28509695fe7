"""An RWKV-7 that evolves through HyperscaleES's interface, as a worker: what members write, scores, and updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

import eggroll.jax as hs
from eggroll.core.config import ESConfig
from eggroll.core.records import UpdateRecord
from eggroll.distributed.partition import ranges
from eggroll.errors import CheckpointError
from eggroll.jax.strategy import optimizer_for
from eggroll.llm.tasks import Task
from eggroll.loop import Evaluation, Heldout

EggRoll, RWKV7 = hs.noiser.eggroll.EggRoll, hs.models.rwkv7.RWKV7
END = 0
"""The token that ends a text."""
TESTED = 128
"""Test problems at most."""


class Tokenizer(Protocol):
    """Text to tokens and back."""

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Tokens of each prompt."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""


class Static(NamedTuple):
    """A tree of plain values that can be hashed, so that what is compiled for it serves other runs too."""

    leaves: tuple[Any, ...]
    structure: Any

    @classmethod
    def of(cls, tree: Any) -> Static:
        """The tree, as a static argument of a compiled function."""
        leaves, structure = jax.tree.flatten(tree)
        return cls(tuple(leaves), structure)

    @property
    def tree(self) -> Any:
        """The tree again."""
        return jax.tree.unflatten(self.structure, self.leaves)


class Search(NamedTuple):
    """What compiled functions have to know of the options."""

    config: ESConfig
    vectors: bool

    @classmethod
    def of(cls, options: Any) -> Search:
        """Without what changes from run to run."""
        names = ("rank", "noise_reuse", "optimizer", "weight_decay", "anchored_weight_decay", "momentum", "betas")
        return cls(ESConfig(**{name: getattr(options, name) for name in names}), options.vectors)

    def noiser(self, params: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """HyperscaleES's two states; the learning rate is a part of the solver's own."""

        def rule(learning_rate: Any) -> Any:
            return optax.chain(optimizer_for(self.config), optax.scale(learning_rate))

        return EggRoll.init_noiser(
            params, 0.0, 1.0, solver=optax.inject_hyperparams(rule), rank=self.config.rank,
            noise_reuse=self.config.noise_reuse, freeze_nonlora=not self.vectors, use_batched_update=True,
        )  # fmt: skip


@partial(jax.jit, static_argnames=("search", "sizes", "length", "temperature"))
def written(
    params: Any, keys: Any, sigma: Any, epoch: Any, threads: Any, tokens: Any, mask: Any, draws: Any,
    *, search: Search, sizes: Static, length: int, temperature: float,
) -> Any:  # fmt: skip
    """What members write: ``(M, Q, length)`` tokens.

    Args:
        params, keys: the center, and ``simple_es_tree_key`` of it.
        sigma, epoch, threads: of the noise; ``threads (M,)``. With a sigma of 0 a member is the center.
        tokens, mask: ``(M, Q, T)`` prompts, padded on the left.
        draws: ``(M, Q)`` random keys, one for each completion.
        search, sizes: the noiser's settings and the model's.
        length: tokens that are written.
        temperature: of sampling.
    """
    frozen, _ = search.noiser({})

    def member(thread: Any, tokens: Any, mask: Any, draws: Any) -> Any:
        read = partial(
            RWKV7.forward, EggRoll, frozen, {"sigma": sigma}, sizes.tree, params, keys, (epoch, thread), last_only=True
        )

        def choose(logits: Any, place: Any) -> Any:
            if not temperature:
                return logits.argmax(-1)
            noise = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, place), logits.shape[-1:]))(draws)
            return (logits / temperature + noise).argmax(-1)

        def step(carry: tuple[Any, Any], place: Any) -> tuple[tuple[Any, Any], Any]:
            logits, state = carry
            token = choose(logits, place)
            return read(token[:, None], state), token

        # The last token that is written is read too, and what comes behind it is not used.
        _, chosen = jax.lax.scan(step, read(tokens, None, mask), jnp.arange(length))
        return chosen.T

    return jax.vmap(member)(threads, tokens, mask, draws)


@partial(jax.jit, static_argnames=("search", "es_map"))
def updated(
    noiser: Any, params: Any, keys: Any, weights: Any, threads: Any, epoch: Any, sigma: Any, lr: Any,
    *, search: Search, es_map: Static,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """The noiser's state and the center after an update, and the norm of the change.

    ``do_updates`` hands its solver ``-sqrt(N) sigma`` times the mean of ``weight * E`` (docs/scale-conventions.md), so
    that weights over ``sqrt(N) sigma`` make it eggroll's gradient, and learning rates mean what they mean elsewhere.
    """
    frozen, _ = search.noiser({})
    hyperparams = {**noiser["opt_state"].hyperparams, "learning_rate": lr}
    noiser = {"sigma": sigma, "opt_state": noiser["opt_state"]._replace(hyperparams=hyperparams)}
    fitnesses, epochs = weights / (sigma * jnp.sqrt(weights.size)), jnp.full(threads.shape, epoch)
    noiser, new = EggRoll.do_updates(frozen, noiser, params, keys, fitnesses, (epochs, threads), es_map.tree)
    squares = jax.tree.map(lambda one, other: jnp.sum((one - other) ** 2), new, params)
    return noiser, new, jnp.sqrt(sum(jax.tree.leaves(squares)))


class NoiserWorker:
    """A model under evolution (a :class:`eggroll.loop.Worker`).

    Args:
        options: of the recipe.
        init: the first model, as ``rand_init`` and ``load`` give it.
        task: what it is to become better at.
        tokenizer: the model's.
        key: a random key, of which the noise and the sampling are made.
    """

    def __init__(self, options: Any, init: Any, task: Task, tokenizer: Tokenizer, key: Any) -> None:
        self.options, self.search, self.task, self.tokenizer = options, Search.of(options), task, tokenizer
        noise_key, self.sampling_key = jax.random.split(key)
        self.sizes, self.es_map = Static.of(init.frozen_params), Static.of(init.es_map)
        self.params = jax.device_put(init.params, options.place())
        self.keys = hs.models.common.simple_es_tree_key(init.params, noise_key, init.scan_map)
        self.noiser = self.search.noiser(self.params)[1]
        self.threads = np.arange(options.population_size) * (1 if options.antithetic else 2)
        rows = [row["prompt"] for row in (*self.task.train, *self.task.heldout, *self.task.test[:TESTED])]
        self.width = max(map(len, self.tokenizer.encode(rows)))

    @property
    def num_evolved(self) -> int:
        """Parameters that an update moves."""
        kinds = {hs.models.common.MM_PARAM} | ({hs.models.common.PARAM} if self.options.vectors else set())
        leaves = zip(jax.tree.leaves(self.params), self.es_map.leaves, strict=True)
        return sum(leaf.size for leaf, kind in leaves if kind in kinds)

    def evaluate(self, generation: int, sigma: float, members: range) -> Evaluation:
        """Scores ``(members, prompts)`` of some members, all on the same problems and with the same random draws."""
        chosen = np.random.default_rng([self.options.seed, generation]).choice(
            len(self.task.train), min(self.options.prompts, len(self.task.train)), replace=False
        )
        rows = [self.task.train[index] for index in chosen]
        texts: list[list[str]] = []
        for part in ranges(members, self._together):
            texts += self._write(
                sigma, generation, self.threads[part.start : part.stop], [rows] * len(part), 1 + generation
            )
        scores = [self._scores(rows, completions) for completions in texts]
        sample = self._samples(rows[:1], texts[0][:1], scores[0][:1], member=members.start)
        return Evaluation(
            np.array(scores, np.float64), tokens=len(members) * len(rows) * self.options.max_tokens, samples=sample
        )

    def heldout(self, generation: int) -> Heldout:
        """The center's mean score on held-out problems."""
        texts, scores = self.center(self.task.heldout)
        return Heldout(float(np.mean(scores)), samples=self._samples(self.task.heldout[:2], texts[:2], scores[:2]))

    def center(self, rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[float]]:
        """What the center writes for each of ``rows``, and its scores."""
        each = self.options.prompts
        groups = [rows[start : start + each] for start in range(0, len(rows), each)]
        texts: list[str] = []
        for start in range(0, len(groups), self._together):
            some = groups[start : start + self._together]
            for group in self._write(0.0, 0, np.zeros(len(some), int), some, 0):
                texts += group
        return texts, self._scores(rows, texts)

    @property
    def _together(self) -> int:
        """Members that are evaluated together: an even number, always the same, so that it is compiled once."""
        most = min(self.options.members_per_forward or self.options.population_size, self.options.population_size)
        return max(2, most - most % 2)

    def _write(
        self, sigma: float, epoch: int, threads: NDArray[Any], rows: Sequence[Sequence[Mapping[str, Any]]], stream: int
    ) -> list[list[str]]:
        """What members with the noise of ``threads`` write, each for its own rows."""
        size, each = self._together, self.options.prompts
        tokens = np.zeros((size, each, self.width), np.int32)
        mask = np.zeros(tokens.shape, bool)
        mask[:, :, -1] = True  # of rows that are only there to fill up
        for member, own in enumerate(rows):
            for row, prompt in enumerate(self.tokenizer.encode([line["prompt"] for line in own])):
                tokens[member, row, self.width - len(prompt) :] = prompt
                mask[member, row, self.width - len(prompt) :] = True
        key = jax.random.fold_in(self.sampling_key, stream)
        shape = (size, each) if stream == 0 else (1, each)
        draws = jnp.broadcast_to(jax.random.split(key, shape), (size, each))
        ids = np.asarray(
            written(
                self.params,
                self.keys,
                jnp.float32(sigma),
                jnp.int32(epoch),
                jnp.asarray(np.resize(threads, size), jnp.int32),
                tokens,
                mask,
                draws,
                search=self.search,
                sizes=self.sizes,
                length=self.options.max_tokens,
                temperature=self.options.temperature,
            )
        )
        return [
            [self._text(ids[member, row]) for row in range(len(own))] for member, own in enumerate(rows)
        ]  # fmt: skip

    def _text(self, ids: NDArray[Any]) -> str:
        found = ids.tolist()
        return self.tokenizer.decode(found[: found.index(END)] if END in found else found)

    def _scores(self, rows: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> list[float]:
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        return list(self.task.reward([row["prompt"] for row in rows], texts, **columns))

    @staticmethod
    def _samples(
        rows: Sequence[Mapping[str, Any]], texts: Sequence[str], scores: Sequence[float], member: int | str = "center"
    ) -> list[dict[str, Any]]:
        every = zip(rows, texts, scores, strict=True)
        return [
            {"member": member, "prompt": row["prompt"], "completion": text, "score": score}
            for row, text, score in every
        ]

    def apply(self, record: UpdateRecord) -> float:
        """Take one update; returns the norm of the change."""
        numbers = (np.float32(value) for value in (record.sigma, record.lr))
        self.noiser, self.params, norm = updated(
            self.noiser, self.params, self.keys, record.weights, self.threads, record.generation, *numbers,
            search=self.search, es_map=self.es_map,
        )  # fmt: skip
        return float(norm)

    def state_tensors(self) -> dict[str, NDArray[Any]]:
        """The center and the solver's state, as NumPy arrays by path."""
        return {name: np.asarray(value) for name, value in self._flat()}

    def load_state_tensors(self, tensors: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state_tensors`.

        Raises:
            CheckpointError: an array is missing or has another shape.
        """
        values = []
        for name, old in self._flat():
            new = tensors.get(name)
            if new is None or tuple(new.shape) != jnp.shape(old):
                found = "missing" if new is None else f"{tuple(new.shape)}, not {jnp.shape(old)}"
                raise CheckpointError(f"the checkpoint does not fit this model: {name} is {found}")
            values.append(jax.device_put(jnp.array(np.asarray(new), old.dtype), self.options.place()))
        self.params, self.noiser = jax.tree.unflatten(jax.tree.structure((self.params, self.noiser)), values)

    def _flat(self) -> list[tuple[str, Any]]:
        paths = jax.tree_util.tree_flatten_with_path((self.params, self.noiser))[0]
        return [(jax.tree_util.keystr(path, simple=True, separator="/"), jnp.asarray(value)) for path, value in paths]
