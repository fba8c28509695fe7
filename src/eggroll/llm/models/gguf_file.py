"""GGUF files kept in their own format: loaded as blocks, and written back as the file they came from.

Names, configuration and the order of rows are transformers' and gguf's own; only the expansion to floating point is
left out, for the block formats that can be moved. A tensor in another format is expanded, and then trained as any
other.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eggroll._optional import require
from eggroll.errors import ModelError
from eggroll.llm.models.gguf_reader import parsed_once
from eggroll.llm.models.locate import Located
from eggroll.torch.quantized.gguf import TYPES, GgufGrid
from eggroll.torch.quantized.grid import Bits
from eggroll.torch.quantized.tensor import as_parameter, grid_of, plain

PLAIN = ("F32", "F16", "BF16")
"""Formats of GGUF that hold plain numbers."""


class MergedTensorsError(ModelError):
    """A model's parameters are made of several tensors of its GGUF file each, so their blocks cannot be kept."""


@dataclass
class GgufSource:
    """Where a model's parameters are in the file that it came from.

    Attributes:
        path: the file.
        tensors: the model's name of a parameter to the file's.
        orders: for parameters whose rows the file has in another order: the file's row of each of the model's rows.
        expanded: the file's formats of tensors that could not be kept, and how many of each.
        fixed: digests, as loaded, of parameters that the file cannot take back.
    """

    path: Path
    tensors: dict[str, str] = field(default_factory=dict)
    orders: dict[str, Tensor] = field(default_factory=dict)
    expanded: dict[str, int] = field(default_factory=dict)
    fixed: dict[str, bytes] = field(default_factory=dict)


def load_gguf(path: Path, config: Any, auto: Any, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
    """A model with its weights in the file's blocks.

    Args:
        path: the file.
        config: the model's configuration, read from it.
        auto: the class of transformers that makes the model.
        dtype: of everything that is not quantized, and of the products' results.
        device: where the weights go.

    Returns:
        The model; ``model.gguf_source`` says where everything came from.

    Raises:
        ModelError: the file holds tensors that the model has no place for, or not all of the model's.
        MergedTensorsError: transformers merges tensors (experts), so blocks cannot be kept.
    """
    gguf: Any = require("gguf", extra="llm")
    accelerate: Any = require("accelerate", extra="llm")
    from transformers import modeling_gguf_pytorch_utils as names

    with accelerate.init_empty_weights(include_buffers=False):
        model = auto.from_config(config, dtype=dtype)
    reader = gguf.GGUFReader(str(path))
    architecture = reader.fields["general.architecture"].contents()
    processor = names.TENSOR_PROCESSORS.get(architecture, names.TensorProcessor)(config.to_dict())
    places = names.get_gguf_hf_weights_map(model, processor)
    source = GgufSource(path)
    for tensor in reader.tensors:
        name = places.get(tensor.name)
        if name is None:
            continue  # tables that belong to the file (rotary frequencies)
        source.tensors[name] = tensor.name
        try:
            contents, kind = _read(tensor, name, processor, dtype, source)
        except (KeyError, TypeError, AttributeError) as error:  # it asks for the parameters that are made so far
            raise MergedTensorsError(f"{name} is made of several tensors of {path}") from error
        _place(model, name, contents.to(device), kind)
    model.tie_weights()
    empty = sorted(name for name, parameter in model.named_parameters() if parameter.is_meta)
    if empty:
        raise ModelError(
            f"the GGUF file {path} lacks {len(empty)} of the model's parameters (the first is {empty[0]!r}); give a "
            "complete file, or quantize='none' to let transformers read it"
        )
    model.gguf_source = source
    return model


def gguf_bits(model: Any, located: Located) -> dict[str, Bits]:
    """Bits per weight (code, scales) of the parameters that :func:`load_gguf` would keep in the file's format, by name.

    Args:
        model: the model without its weights.
        located: where the file is.
    """
    gguf: Any = require("gguf", extra="llm")
    from transformers import modeling_gguf_pytorch_utils as names

    reader = gguf.GGUFReader(str(Path(located.path) / str(located.gguf)))
    places = names.get_gguf_hf_weights_map(model, names.TensorProcessor())
    kinds = {places.get(tensor.name): tensor.tensor_type.name for tensor in reader.tensors}
    return {name: TYPES[kind].bits for name, kind in kinds.items() if name and kind in TYPES}


def save_gguf(model: Any, target: str | Path) -> Path:
    """Write a model that came from a GGUF file as one: the same file with today's weights.

    Args:
        model: from :func:`load_gguf`.
        target: the new file.

    Raises:
        ModelError: the model came from something else, or has a tensor that the file's format cannot hold.
    """
    source: GgufSource | None = getattr(model, "gguf_source", None)
    if source is None:
        raise ModelError("only a model that was loaded from a GGUF file, with its weights kept, can be saved as one")
    changed = changed_beyond(model)
    if changed:
        raise ModelError(
            f"parameter {changed[0]!r} is in a form in the GGUF file that cannot be written; it was expanded and "
            "trained. Leave it out of training (exclude), or save a Hugging Face directory"
        )
    gguf: Any = require("gguf", extra="llm")
    target = Path(target)
    shutil.copyfile(source.path, target)
    with parsed_once(), target.open("r+b") as file:
        for tensor, contents in _contents(model, source, gguf.GGUFReader(str(source.path))):
            file.seek(int(tensor.data_offset))
            file.write(contents)
    return target


def changed_beyond(model: Any) -> list[str]:
    """Parameters that changed since they were loaded, and that the GGUF file which they came from cannot take back."""
    source: GgufSource = model.gguf_source
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [name for name, digest in source.fixed.items() if _digest(parameters[name].detach().cpu()) != digest]


@contextmanager
def expanded(model: nn.Module) -> Iterator[None]:
    """Within the block, quantized weights are plain numbers: for saving where GGUF cannot hold the model."""
    before = [(module, name, weight) for module in model.modules() for name, weight in module._parameters.items()]
    before = [entry for entry in before if grid_of(entry[2]) is not None]
    # tied weights once
    numbers = {
        id(weight): nn.Parameter(plain(weight), requires_grad=False) for _, _, weight in before if weight is not None
    }
    try:
        for module, name, weight in before:
            module._parameters[name] = numbers[id(weight)]
        yield
    finally:
        for module, name, weight in before:
            module._parameters[name] = weight


def _digest(values: Tensor) -> bytes:
    return hashlib.blake2b(values.contiguous().view(torch.uint8).numpy().data).digest()


def _read(tensor: Any, name: str, processor: Any, dtype: torch.dtype, source: GgufSource) -> tuple[Tensor, str | None]:
    """A tensor's blocks and their format, or its numbers and ``None``; rows in the model's order."""
    kind, data = tensor.tensor_type.name, np.asarray(tensor.data)
    order = _row_order(tensor, processor)
    if kind in TYPES and data.ndim == 2 and order is not None:
        if not np.array_equal(order, np.arange(len(order))):
            source.orders[name] = torch.from_numpy(order)
        return torch.from_numpy(np.ascontiguousarray(data[order])), kind
    if kind not in PLAIN:
        source.expanded[kind] = source.expanded.get(kind, 0) + 1
    gguf: Any = require("gguf", extra="llm")
    numbers = processor.process(weights=gguf.quants.dequantize(data, tensor.tensor_type), name=tensor.name).weights
    if order is not None and not np.array_equal(order, np.arange(len(order))):
        source.orders[name] = torch.from_numpy(order)
    held = torch.from_numpy(np.array(numbers)).to(dtype)
    if kind not in PLAIN or order is None:  # in a format that is not written, or with other numbers than the file's
        source.tensors.pop(name)
        source.fixed[name] = _digest(held)
    return held, None


def _row_order(tensor: Any, processor: Any) -> np.ndarray[Any, Any] | None:
    """The file's row of each of the model's rows; ``None`` if what transformers does is more than changing their order.

    Found out by letting it process the numbers of the rows instead of the rows.
    """
    rows = tensor.data.shape[0]
    numbers = np.arange(rows, dtype=np.float64)
    if tensor.data.ndim > 1:
        numbers = np.repeat(numbers[:, None], 2, axis=1)
    done = np.asarray(processor.process(weights=numbers, name=tensor.name).weights)
    if done.shape != numbers.shape:
        return None
    order = done if done.ndim == 1 else done[:, 0]
    same = np.array_equal(np.sort(order), np.arange(rows)) and (done.ndim == 1 or np.array_equal(done[:, 1], order))
    return order.astype(np.int64) if same else None


def _place(model: nn.Module, name: str, contents: Tensor, kind: str | None) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    meta = module._parameters.get(attribute)
    if meta is None:
        if attribute in module._buffers:
            module._buffers[attribute] = contents
        return
    if kind is None:
        parameter = nn.Parameter(contents.view(meta.shape), requires_grad=False)
    else:
        parameter = as_parameter(GgufGrid(contents, kind, meta.dtype))
    if parameter.shape != meta.shape:
        raise ModelError(
            f"tensor {name!r} of the GGUF file is {tuple(parameter.shape)}, the model's is {tuple(meta.shape)}"
        )
    module._parameters[attribute] = parameter


def _contents(model: Any, source: GgufSource, reader: Any) -> Iterator[tuple[Any, bytes]]:
    """Tensors of the file whose contents come from the model, and the bytes of each."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    for name, file_name in source.tensors.items():
        tensor, parameter = by_name[file_name], parameters.get(name)
        if parameter is None:
            continue
        grid = grid_of(parameter)
        held = parameter.detach().float() if grid is None else grid.stored
        if name in source.orders:
            original = torch.empty_like(held)
            original[source.orders[name]] = held
            held = original
        if grid is not None or tensor.tensor_type.name == "F32":
            yield tensor, held.contiguous().cpu().numpy().tobytes()
        elif tensor.tensor_type.name == "F16":
            yield tensor, held.half().contiguous().cpu().numpy().tobytes()
        elif tensor.tensor_type.name == "BF16":
            yield tensor, held.bfloat16().contiguous().view(torch.int16).cpu().numpy().tobytes()
