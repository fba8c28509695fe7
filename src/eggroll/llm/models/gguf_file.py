"""GGUF files kept in their own format: loaded as blocks, and written back as the file they came from.

Names, configuration and the order of rows are transformers' and gguf's own; only the expansion to floating point is
left out, for the block formats that can be moved. A tensor in another format is expanded, and then trained as any
other.
"""

from __future__ import annotations

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
from eggroll.llm.models.gguf_tensors import EXPERTS, MERGED, PLAIN, in_order, parameter_of, row_order
from eggroll.llm.models.locate import Located
from eggroll.torch.quantized.gguf import TYPES, GgufGrid
from eggroll.torch.quantized.grid import Bits
from eggroll.torch.quantized.tensor import as_parameter, grid_of, plain


class OtherReaderError(ModelError):
    """A GGUF file that transformers reads in a way of its own, so it has to be asked."""


@dataclass
class GgufSource:
    """Where a model's parameters are in the file that it came from.

    Attributes:
        path: the file.
        dtype: of the parameters that were expanded.
        processor: what transformers does to tensors of this architecture.
        tensors: the model's name of a parameter to the file's.
        orders: for parameters whose rows the file has in another order: the file's row of each of the model's rows.
        expanded: the file's formats of tensors that could not be kept, and how many of each.
        fixed: parameters that the file cannot take back, and the names of their tensors in it.
    """

    path: Path
    dtype: torch.dtype
    processor: Any
    tensors: dict[str, str] = field(default_factory=dict)
    orders: dict[str, Tensor] = field(default_factory=dict)
    expanded: dict[str, int] = field(default_factory=dict)
    fixed: dict[str, list[str]] = field(default_factory=dict)


def load_gguf(
    path: Path, config: Any, auto: Any, dtype: torch.dtype, device: torch.device | str = "cpu", *, keep: bool = True
) -> Any:
    """A model with its weights in the file's blocks.

    Args:
        path: the file.
        config: the model's configuration, read from it.
        auto: the class of transformers that makes the model.
        dtype: of everything that is not quantized, and of the products' results.
        device: where the weights go.
        keep: the blocks that can be kept; otherwise everything is expanded, and the model is an ordinary one.

    Returns:
        The model; if blocks are kept, ``model.gguf_source`` says where everything came from.

    Raises:
        ModelError: the file does not hold all of the model's tensors, or experts that the model has no place for.
        OtherReaderError: transformers reads this architecture in another way.
    """
    gguf: Any = require("gguf", extra="llm")
    accelerate: Any = require("accelerate", extra="llm")
    from transformers import modeling_gguf_pytorch_utils as names

    reader = gguf.GGUFReader(str(path))
    architecture = reader.fields["general.architecture"].contents()
    if _has_own_reader(architecture):
        raise OtherReaderError(f"transformers reads GGUF files of architecture {architecture!r} in a way of its own")
    with accelerate.init_empty_weights(include_buffers=False):
        model = auto.from_config(config, dtype=dtype)
    processor = names.TENSOR_PROCESSORS.get(architecture, names.TensorProcessor)(config.to_dict())
    source = GgufSource(path, dtype, processor)
    for name, tensors in _placed(reader, model, architecture, path, processor).items():
        try:
            contents, kind = _read(tensors, name, source, keep=keep)
        except (LookupError, TypeError, AttributeError) as error:  # it asks for the parameters that are made so far
            raise OtherReaderError(f"{name} is made of several tensors of {path}") from error
        _place(model, name, contents.to(device), kind)
    model.tie_weights()
    empty = sorted(name for name, parameter in model.named_parameters() if parameter.is_meta)
    if empty:
        raise ModelError(
            f"the GGUF file {path} lacks {len(empty)} of the model's parameters (the first is {empty[0]!r}), by the "
            f"names that transformers {_version()} knows of architecture {architecture!r}; give a complete file, or "
            "the model as a Hugging Face directory"
        )
    if keep:
        model.gguf_source = source
    return model


SIZES = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
"""Fields of a GGUF file that transformers does not read, and what configurations call them."""


def complete_config(config: Any, path: Path) -> bool:
    """Give a configuration the sizes of experts that transformers leaves at its defaults; whether one was changed.

    Args:
        config: read from the file.
        path: the file.
    """
    gguf: Any = require("gguf", extra="llm")
    fields = gguf.GGUFReader(str(path)).fields
    architecture = fields["general.architecture"].contents()
    changed = False
    for name, attribute in SIZES.items():
        found = fields.get(f"{architecture}.{name}")
        if found is not None and getattr(config, attribute, found.contents()) != found.contents():
            setattr(config, attribute, found.contents())
            changed = True
    return changed


def _version() -> str:
    return str(require("transformers", extra="llm").__version__)


def _has_own_reader(architecture: str) -> bool:
    """Whether transformers reads an architecture by rules that are not in its table of processors."""
    try:
        from transformers.integrations.gguf import is_gguf_arch_supported
    except ImportError:  # older versions have one reader for all
        return False
    return bool(is_gguf_arch_supported(architecture))


def _placed(reader: Any, model: Any, architecture: str, path: Path, processor: Any) -> dict[str, list[Any]]:
    """The model's parameters and the file's tensors that each is made of."""
    from transformers import modeling_gguf_pytorch_utils as names

    places = names.get_gguf_hf_weights_map(model, processor)
    found: dict[str, list[Any]] = {}
    for tensor in reader.tensors:
        name = places.get(tensor.name) or places.get(tensor.name.removesuffix(".weight"))  # experts are no modules
        if name is not None:
            found.setdefault(name, []).append(tensor)
        elif EXPERTS.search(tensor.name):
            raise ModelError(
                f"the GGUF file {path} holds a mixture of experts ({tensor.name}) of architecture {architecture!r}, "
                f"of which transformers {_version()} cannot read the experts; give the model as a Hugging Face "
                "directory"
            )  # all others are tables that belong to the file (rotary frequencies)
    for name, tensors in found.items():
        if len(tensors) > 1 and not (len(tensors) == 2 and all(MERGED.search(tensor.name) for tensor in tensors)):
            raise OtherReaderError(f"{name} is made of several tensors of {path}")
    return found


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
    if not source.path.is_file():
        raise ModelError(
            f"the GGUF file {source.path}, which the model came from, is gone; save a Hugging Face directory"
        )
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
    """Parameters that changed since they were loaded, and that the GGUF file which they came from cannot take back.

    They are read from it again. If the file is gone, that is all parameters.
    """
    source: GgufSource = model.gguf_source
    if not source.path.is_file():
        return [*source.fixed, *source.tensors]
    if not source.fixed:
        return []
    parameters = dict(model.named_parameters(remove_duplicate=False))
    gguf: Any = require("gguf", extra="llm")
    with parsed_once():
        by_name = {tensor.name: tensor for tensor in gguf.GGUFReader(str(source.path)).tensors}
    changed = []
    for name, tensors in source.fixed.items():
        held = parameters[name].detach().cpu()
        if not by_name.keys() >= set(tensors):  # another file has taken its place
            changed.append(name)
            continue
        loaded = parameter_of([by_name[tensor] for tensor in tensors], source.processor, source.dtype).view(held.shape)
        if not torch.equal(held, loaded.to(held.dtype)):
            changed.append(name)
    return changed


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


def _read(tensors: list[Any], name: str, source: GgufSource, *, keep: bool) -> tuple[Tensor, str | None]:
    """A parameter's blocks and their format, or its numbers and ``None``; rows in the model's order."""
    tensor, kinds = tensors[0], [tensor.tensor_type.name for tensor in tensors]
    order = row_order(tensor, source.processor) if len(tensors) == 1 else None
    if order is not None and not in_order(order):
        source.orders[name] = torch.from_numpy(order)
    if keep and kinds[0] in TYPES and order is not None and tensor.data.ndim == 2:
        source.tensors[name] = tensor.name
        data = np.asarray(tensor.data)
        return torch.from_numpy(np.array(data) if name not in source.orders else data[order]), kinds[0]
    for kind in kinds:
        if kind not in PLAIN:
            source.expanded[kind] = source.expanded.get(kind, 0) + 1
    held = parameter_of(tensors, source.processor, source.dtype)
    if order is None or kinds[0] not in PLAIN:  # in a format that is not written, or with other numbers than the file's
        source.fixed[name] = [tensor.name for tensor in tensors]
    else:
        source.tensors[name] = tensor.name
    return held, None


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
