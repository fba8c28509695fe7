"""The engine in C: hands chunks of members to threads."""

from __future__ import annotations

import ctypes
import queue
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from eggroll.core.address import parameter_key
from eggroll.pretrain.engines import library
from eggroll.pretrain.engines.base import Result, Step, Work, check_work, empty_result
from eggroll.pretrain.engines.library import address, padded
from eggroll.pretrain.model import fixed_point
from eggroll.pretrain.model.noise import TABLE_NAME, Noise
from eggroll.pretrain.model.oracle import noise_shift
from eggroll.pretrain.model.shape import ModelShape, Parameter

CHUNK = 48
"""Members at once: a multiple of the kernel's 6 rows, few enough that noise and activations stay in the L2 cache."""
BLOCK = 4
"""Steps that a layer makes before the next one does, so that weights are read from far away only every fourth step."""
KINDS = {"matrix": 0, "embedding": 1, "vector": 2}


class CEngine:
    """See :class:`eggroll.pretrain.engines.base.Engine`."""

    def __init__(
        self,
        compiled: ctypes.CDLL,
        params: dict[str, NDArray[np.int8]],
        shape: ModelShape,
        noise: Noise,
        sigma_shift: int,
        threads: int | None,
        chunk: int | None,
    ) -> None:
        self.library, self.params, self.shape, self.noise = compiled, params, shape, noise
        self.chunk, self.block = chunk or CHUNK, BLOCK
        self.momentum: dict[str, NDArray[np.int32]] = {}
        self.threads = threads or torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.threads)
        self._scratch: queue.SimpleQueue[NDArray[np.uint8]] = queue.SimpleQueue()
        for _ in range(self.threads):
            self._scratch.put(np.empty(0, np.uint8))
        self._kept: dict[str, Any] = {}
        self._noise_shift = noise_shift(noise.rank, sigma_shift)
        self.reload()

    def reload(self) -> None:
        """Read ``params`` again, after they were changed."""
        self._model = self._make_model()

    def _make_model(self) -> library.Model:
        """The structure that the library reads, and everything that it points to."""
        shape, rank, kept = self.shape, self.noise.rank, self._kept
        order = {p.name: i for i, p in enumerate(shape.parameters)}
        if "draws" not in kept:
            kept["draws"], kept["pair_bytes"] = _places(shape.parameters, rank)
            kept["exp2"], kept["log2"] = fixed_point.exp2_table(), fixed_point.log2_thresholds()
            kept["normals"] = fixed_point.normal_table()
        blocks = [f"blocks.{i}" for i in range(shape.n_layers)]
        parts = ("gru.Wf", "gru.Uf", "gru.Wh", "gru.Uh", "mlp.up", "mlp.down")
        names = [f"{block}.{part}" for block in blocks for part in parts] + ["head"]
        matrices = [shape.parameters[order[name]] for name in names]
        names = [f"{block}.{part}" for block in blocks for part in ("ln1", "gru.bf", "gru.bh", "ln2")] + ["ln_out"]
        kept["packed"] = [self._pool.submit(library.packed_matrix, self.library, self.params[p.name]) for p in matrices]
        kept["packed"] = [future.result() for future in kept["packed"]]
        kept["matrices"] = (library.Matrix * len(matrices))(
            *(
                library.Matrix(
                    address(packed), address(start), p.inputs, p.outputs, *_division(p.inputs), order[p.name], i * rank
                )
                for i, (p, (packed, start)) in enumerate(zip(matrices, kept["packed"], strict=True))
            )
        )
        kept["vectors"] = _padded_rows(np.stack([self.params[name] for name in names]))
        kept["order"] = np.array([order[name] for name in names], np.int64)
        kept["embedding"] = _padded_rows(self.params["emb"])
        return library.Model(
            shape.vocab, shape.hidden, shape.n_layers, len(shape.parameters),
            ctypes.addressof(kept["matrices"]), address(kept["embedding"]), address(kept["vectors"]),
            address(kept["order"]), address(kept["exp2"]), address(kept["log2"]), len(kept["log2"]),
            0, self._noise_shift, kept["pair_bytes"], len(matrices) * rank,
            address(kept["draws"]), None, address(kept["normals"]),
        )  # fmt: skip

    def _with_noise(self) -> library.Model:
        """The model with its noise switched on."""
        model = library.Model.from_buffer_copy(self._model)
        model.rank = self.noise.rank
        if self.noise.kind == "table":
            if not self.noise._tables:
                self.noise._tables.append(self._make_table())
            model.table = address(self.noise.table())
        return model

    def _make_table(self) -> NDArray[np.int8]:
        hi, lo = parameter_key(self.noise.seed, TABLE_NAME)
        keys, made = np.array([hi << 32 | lo], np.uint64), np.empty(self.noise.table_size, np.int8)
        self.library.eggroll_normals(address(keys), 1, made.size, address(fixed_point.normal_table()), address(made))
        return made

    def _addresses(self, parameter: Parameter, generation: int, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        if self.noise.kind == "table":
            return self.noise.offsets(parameter, generation, pairs)
        words = self.noise.keys(parameter, generation, pairs).astype(np.uint64)
        return (words[:, 0] << np.uint64(32) | words[:, 1]).view(np.int64)

    def run(self, work: Work) -> Result:
        """Evaluate, a chunk of members at a time."""
        check_work(work, self.shape)
        result = empty_result(work, self.shape)
        tokens = np.ascontiguousarray(work.tokens, np.uint8)
        state = None if work.state is None else np.ascontiguousarray(work.state, np.int8)
        members = len(work.window)
        model, pairs, addresses = self._model, np.zeros(0, np.int64), None
        if work.pairs is not None:
            model = self._with_noise()
            pairs, inverse = np.unique(work.pairs, return_inverse=True)
            addresses = np.stack([self._addresses(p, work.generation, pairs) for p in self.shape.parameters])
        size = min(self.chunk, max(1, -(-members // self.threads)))
        size += size % 2  # both of a pair, so that they share their noise in the cache

        def evaluate(first: int) -> None:
            part = slice(first, min(first + size, members))
            count = part.stop - part.start
            window = np.ascontiguousarray(work.window[part], np.int32)
            local, signs, chunk_addresses = np.zeros(count, np.int32), np.ones(count, np.int32), None
            number = 0
            if addresses is not None:
                assert work.signs is not None
                found, position = np.unique(inverse[part], return_inverse=True)
                chunk_addresses = np.ascontiguousarray(addresses[:, found])
                local, number = position.astype(np.int32), len(found)
                signs = np.ascontiguousarray(work.signs[part], np.int32)
            fields = (result.logits, result.likelihood, result.fitness)
            views = [None if x is None else x[part] for x in (result.state, *fields)]
            steps = tokens.shape[1] - 1
            job = library.Work(
                count, number, steps, min(self.block, steps), address(local), address(signs), address(window),
                address(tokens), tokens.shape[1], address(chunk_addresses), number, address(state),
                *(address(view) for view in views), None,
            )  # fmt: skip
            with_scratch(self._scratch, self.library.eggroll_scratch(model, job), self._evaluate(model, job))

        self._each(evaluate, range(0, members, size))
        return result

    def _evaluate(self, model: library.Model, job: library.Work) -> Callable[[int], None]:
        def call(scratch: int) -> None:
            job.scratch = scratch
            self.library.eggroll_evaluate(model, job)

        return call

    def update(self, generation: int, pairs: NDArray[np.int64], fitness: NDArray[np.int8], step: Step) -> int:
        """Move the weights; returns how many have moved."""
        used = np.flatnonzero(fitness)
        model, fitness, pairs = self._with_noise(), np.ascontiguousarray(fitness[used]), pairs[used]
        moved: list[int] = []

        def one(index: int) -> None:
            parameter = self.shape.parameters[index]
            weights, addresses = self.params[parameter.name], self._addresses(parameter, generation, pairs)
            momentum = None
            if step.momentum_shift:
                momentum = self.momentum.setdefault(parameter.name, np.zeros(weights.shape, np.int32))
            job = library.Update(
                ctypes.pointer(model), index, KINDS[parameter.kind], len(pairs), address(addresses), address(fitness),
                step.sign_of_noise, address(weights), address(momentum), step.limit, step.unit, step.momentum_shift,
                None,
            )  # fmt: skip

            def call(scratch: int) -> None:
                job.scratch = scratch
                moved.append(self.library.eggroll_update(job))

            with_scratch(self._scratch, self.library.eggroll_update_scratch(job), call)

        largest_first = sorted(range(len(self.shape.parameters)), key=lambda i: -self.params_size(i))
        self._each(one, largest_first)
        self.reload()
        return sum(moved)

    def params_size(self, index: int) -> int:
        """Entries of a parameter."""
        return self.params[self.shape.parameters[index].name].size

    def _each(self, function: Callable[[int], None], arguments: Iterable[int]) -> None:
        for done in [self._pool.submit(function, argument) for argument in arguments]:
            done.result()


def with_scratch(spare: queue.SimpleQueue[NDArray[np.uint8]], size: int, call: Callable[[int], None]) -> None:
    """Call with the address of ``size`` bytes, kept for the next call: new memory would cost page faults."""
    memory = spare.get()
    try:
        if memory.size < size:
            memory = np.empty(size, np.uint8)
        call(memory.ctypes.data)
    finally:
        spare.put(memory)


def _division(inputs: int) -> tuple[int, int]:
    """The divisor of a product, and its logarithm, or -1 if it is no power of two."""
    by = fixed_point.divisor(inputs)
    return by, by.bit_length() - 1 if by & (by - 1) == 0 else -1


def _places(parameters: Iterable[Parameter], rank: int) -> tuple[NDArray[np.int64], int]:
    """Inputs, outputs and the places of B and A in a pair's block of noise for every parameter; the block's size."""
    rows, end = [], 0
    for p in parameters:
        b, a = end, end + rank * padded(p.inputs)
        end = a + rank * padded(p.outputs)
        rows.append((p.inputs, p.outputs, b, a))
    return np.array(rows, np.int64), end


def _padded_rows(rows: NDArray[np.int8]) -> NDArray[np.int8]:
    return np.pad(rows, ((0, 0), (0, padded(rows.shape[1]) - rows.shape[1])))
