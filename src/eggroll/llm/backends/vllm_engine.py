"""A vLLM engine whose own base weights are the center of a run: started, asked, updated, watched.

Its workers rebuild each update from its record (:mod:`eggroll.llm.backends.vllm_worker`); this side sends addresses
and records and gets text back.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eggroll._optional import require
from eggroll.core.records import UpdateRecord
from eggroll.core.select import ParameterSpec
from eggroll.errors import ConfigError, EggrollError, EngineDiedError, MemoryBudgetError, ModelError
from eggroll.llm.backends.vllm_parallel import check_sizes, device_count
from eggroll.llm.backends.vllm_worker import MemberAddress, check_equal
from eggroll.llm.config import EggrollConfig
from eggroll.llm.models.outline import Outline
from eggroll.llm.rewards import Reward

WORKER = "eggroll.llm.backends.vllm_worker.EggrollWorker"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM reserves room for; a smaller one is padded with zeros."""
MOST_LORAS = 64
"""Members that the engine holds at once by default; more are taken in turns."""
ID_SPAN = 2**20
"""Identifiers of adapters start again after so many; an adapter lives for one generation only."""


def check_vllm(config: EggrollConfig, outline: Outline, reward: Reward) -> list[ParameterSpec]:
    """The parameters that a run with vLLM evolves, or why it cannot be run there; nothing is loaded for that.

    Raises:
        ConfigError: something is evolved that is no matrix of a linear layer, the rank is too large, or the reward
            needs more than generated text. All problems are listed.
        SelectionError: a pattern matches nothing.
    """
    specs, problems = outline.evolved(config), []
    others = [spec.name for spec in specs if spec.kind != "matrix" or spec.name in outline.head]
    if others:
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        problems.append(
            f"{shown} cannot be evolved: adapters of vLLM change the matrices of linear layers only. Leave out "
            "embeddings, head and vectors, name weights alone in target_modules (q_proj.weight), or use backend='torch'"
        )
    if config.rank > RANKS[-1]:
        problems.append(f"rank (={config.rank}) must be at most {RANKS[-1]}, the largest that vLLM takes")
    if any(part.needs != "text" for part, _ in reward.parts):
        problems.append(
            f"reward {reward.name!r} needs the model's likelihoods or the model itself; vLLM gives generated text. "
            "Use a reward of text, or backend='torch'"
        )
    if problems:
        raise ConfigError.from_problems("backend vllm", problems)
    return specs


class VllmEngine:
    """A vLLM engine whose base weights are the center of a run.

    The engine runs in this process, unless ``VLLM_ENABLE_V1_MULTIPROCESSING=1`` is set. ``close`` frees it.

    Args:
        model: a directory or hub id.
        config: the settings of the run.
        specs: the evolved parameters (:func:`check_vllm`).
        dtype: of the engine's weights.
        outline: of the model, for sizes.
        engine_args: anything that ``vllm.LLM`` takes, such as ``{"tensor_parallel_size": 2}``; they win over what is
            chosen here.

    Raises:
        ConfigError: the engine's processes cannot share the model out like that.
        MissingExtraError: vLLM is not installed.
        MemoryBudgetError: the model or its cache do not fit.
        ModelError: the engine does not start, or its model does not hold the parameters.
    """

    def __init__(
        self,
        model: str,
        config: EggrollConfig,
        specs: Sequence[ParameterSpec],
        *,
        dtype: torch.dtype,
        outline: Outline,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        check_sizes(engine_args or {})
        self.model, self.config, self.specs = model, config, list(specs)
        self.dtype = str(dtype).removeprefix("torch.")
        self.prepared = -1
        self.asked = (-1, 0.0)
        self.tries = 0
        self.records: list[UpdateRecord] = []
        self.update_cosine: float | None = None
        arguments = self._arguments(outline, engine_args or {})
        self.max_loras = int(arguments["max_loras"])
        self.llm: Any = _start(arguments)
        try:
            rows = [[spec.name, list(spec.shape), spec.kind] for spec in self.specs]
            missing = check_equal(self.call("eggroll_set_up", _es_settings(config), rows, self.dtype), "the parameters")
            if missing:
                raise ModelError(
                    f"vLLM's model of {model} cannot evolve {', '.join(missing[:3])}"
                    f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}: not in the model's files under "
                    "that name, or in a layer that takes no adapter. Exclude them, or use backend='torch'"
                )
        except BaseException:
            self.close()
            raise

    def _arguments(self, outline: Outline, given: Mapping[str, Any]) -> dict[str, Any]:
        vllm = _vllm()
        config, members = self.config, self.config.population_size
        length = config.max_length + config.max_tokens
        chosen: dict[str, Any] = {
            "model": self.model,
            "dtype": self.dtype,
            "seed": config.seed % 2**31,
            "enable_lora": True,
            "max_lora_rank": next(rank for rank in RANKS if rank >= config.rank),
            "max_loras": min(members, MOST_LORAS),
            "lora_target_modules": sorted({spec.name.split(".")[-2] for spec in self.specs}),
            "max_model_len": length,
            "worker_extension_cls": WORKER,
            "use_tqdm_on_load": False,
        }
        if vllm.platforms.current_platform.is_cpu():
            chosen["enforce_eager"] = True
            _spare_nodes(device_count(given))
            per_token = (
                2 * outline.layers * outline.kv_heads * outline.head_size * (2 if self.dtype != "float32" else 4)
            )
            rows = chosen["max_loras"] * config.prompts_per_generation * config.samples_per_prompt
            chosen["kv_cache_memory_bytes"] = _cache_bytes(per_token * (length + 128), rows)
        else:
            # Asked of vLLM, which asks the driver: this process need not hold the GPU, and must not take memory on it.
            total = vllm.platforms.current_platform.get_device_total_memory(0)
            free = 0.9 - _state_bytes(self.specs, config, self.dtype) / total
            chosen["gpu_memory_utilization"] = round(max(0.1, free), 3)
        return {**chosen, **given}

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call a method on all workers.

        Raises:
            EngineDiedError: the engine died.
        """
        try:
            return list(self._answers(method, arguments))
        except EggrollError:
            raise
        except Exception as error:
            raise _died(error, f"in {method}") from error

    def _answers(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """What the workers answer. An engine in a process of its own is watched: vLLM would wait for a dead one."""
        resources = getattr(self.llm.llm_engine.engine_core, "resources", None)
        if resources is None:
            return self.llm.collective_rpc(method, args=arguments)
        answer: Future[Any] = Future()

        def ask() -> None:
            try:
                answer.set_result(self.llm.collective_rpc(method, args=arguments))
            except BaseException as error:
                answer.set_exception(error)

        # A daemon: if the engine is dead, it waits for ever, and must not keep the interpreter from ending.
        threading.Thread(target=ask, name=f"eggroll-{method}", daemon=True).start()
        while not answer.done():
            wait([answer], timeout=0.5)
            if resources.engine_dead and not answer.done():
                raise RuntimeError("its process has ended")
        return answer.result()

    def apply(self, record: UpdateRecord) -> float:
        """Let the engine take one update; returns the norm of the change."""
        self.records.append(record)
        norm, self.update_cosine = check_equal(self.call("eggroll_apply", record.to_json()), "an update's size")
        self.llm.reset_prefix_cache()  # what is cached for the center belonged to the weights before
        return float(norm)

    def digest(self) -> str:
        """A digest of the evolved weights, checked to be the same on all workers."""
        return str(check_equal(self.call("eggroll_digest"), "the evolved weights"))

    def state_tensors(self) -> dict[str, Tensor]:
        """Evolved parameters, masters and optimizer state, as of the PyTorch replica, read through a temporary file."""
        from safetensors.torch import load_file

        self.digest()
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "state.safetensors")
            self.call("eggroll_save", path)
            return load_file(path)

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state_tensors` gave."""
        from safetensors.torch import save_file

        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "state.safetensors")
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path)
            self.call("eggroll_load", path)
        self.llm.reset_prefix_cache()

    def request(self, generation: int, member: int, sigma: float) -> Any:
        """The adapter request of a member: its path is its address, its name is never used for another one.

        The name and the path are part of the key of vLLM's prefix cache, so members never share an entry. Nor does an
        adapter serve another sigma (before a run several are tried): its number would be one that vLLM has already.
        """
        from vllm.lora.request import LoRARequest

        if self.asked[0] == generation and self.asked[1] != sigma:
            self.tries += 1
        self.asked = (generation, sigma)
        size = self.config.population_size
        number = ((generation + self.tries) * size + member) % ID_SPAN + 1
        path = MemberAddress(generation, member, sigma).path()
        return LoRARequest(f"eggroll-{generation + self.tries}-{member}", number, path)

    def generate(
        self, prompts: Sequence[list[int]], sampling: Sequence[Any], requests: Sequence[Any] | None
    ) -> list[Any]:
        """vLLM's outputs for token ids, in order.

        Raises:
            EngineDiedError: the engine died.
        """
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        try:
            return list(self.llm.generate(inputs, list(sampling), lora_request=requests, use_tqdm=False))
        except Exception as error:
            raise _died(error, "while it generated") from error
        except BaseException:  # Ctrl-C: what it leaves unfinished would be among the next call's answers
            self._give_up()
            raise

    def _give_up(self) -> None:
        """Take back all requests that are not finished."""
        engine = self.llm.llm_engine
        engine.abort_request(list(engine.output_processor.request_states), internal=True)

    def prepare(self, generation: int) -> None:
        """Draw the generation's noise once, if it is small enough to be kept."""
        if generation != self.prepared:
            self.call("eggroll_prepare", generation)
            self.prepared = generation

    def close(self) -> None:
        """Free the engine."""
        llm, self.llm = self.llm, None
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()


def _es_settings(config: EggrollConfig) -> dict[str, Any]:
    """The part of the settings that the workers need."""
    from eggroll.core.config import ESConfig

    names = {field.name for field in dataclasses.fields(ESConfig)}
    return {name: value for name, value in config.to_dict().items() if name in names}


def _vllm() -> Any:
    """vLLM, quiet and in this process unless the environment says otherwise."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    module = require("vllm", extra="vllm")
    require("vllm.platforms", extra="vllm")
    return module


def _start(arguments: dict[str, Any]) -> Any:
    vllm = _vllm()
    try:
        return vllm.LLM(**arguments)
    except Exception as error:
        reason = _root(error)
        if "memory" in reason.lower() or "KV cache" in reason:
            raise MemoryBudgetError(
                f"vLLM has no room for {arguments['model']}: {reason}. Give it less to hold (shorter max_length and "
                "max_tokens, fewer members at once with engine_args max_loras) or more memory "
                "(engine_args gpu_memory_utilization or kv_cache_memory_bytes)"
            ) from error
        raise ModelError(
            f"vLLM does not start with {arguments['model']}: {reason}. Its own log is shown with "
            "VLLM_LOGGING_LEVEL=INFO; backend='torch' runs every Hugging Face model"
        ) from error


def _died(error: Exception, when: str) -> EngineDiedError:
    return EngineDiedError(
        f"the vLLM engine died {when}: {_root(error)}. The run is intact up to the last finished generation; "
        "continue it with --resume. The engine's own log is shown with VLLM_LOGGING_LEVEL=INFO"
    )


def _root(error: BaseException) -> str:
    """The first line of what went wrong first."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _spare_nodes(processes: int) -> None:
    """On a CPU vLLM binds each process of an engine to a NUMA node of its own, and does not start with fewer nodes."""
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1
    if processes > nodes:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def _cache_bytes(per_row: int, rows: int) -> int:
    """Room for all rows of the KV cache, but at most half of the memory that is free, and at least for one."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(max(per_row * 2, min(per_row * rows, free // 2)))


def _state_bytes(specs: Sequence[ParameterSpec], config: EggrollConfig, dtype: str) -> int:
    """What workers keep besides the engine: copies of the evolved weights, masters, optimizer state, one gradient."""
    size = sum(spec.size for spec in specs)
    element = each = 4 if dtype == "float32" else 2
    if each == 2 and config.rounding in ("auto", "master"):
        each += 4
    each += {"sgd": 0, "momentum": 4}.get(config.optimizer, 8)
    if config.anchored_weight_decay:
        each += element  # the start weights
    return size * each + 8 * max(spec.size for spec in specs)
