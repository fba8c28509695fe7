"""Architectures of transformers, one for each model type: a head, a tiny configuration, plain inputs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .case import Built, Case, Inputs, NoCaseError, fill
from .exceptions import CONFIGS, HEADS, INPUTS, LEFT_OUT
from .shrink import VOCABULARY, shrunk

# The first collection that knows a model type gives its class.
COLLECTIONS = (
    "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "CAUSAL_LM", "IMAGE_CLASSIFICATION", "VIDEO_CLASSIFICATION", "CTC",
    "SPEECH_SEQ_2_SEQ", "AUDIO_CLASSIFICATION", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION", "IMAGE_TO_IMAGE",
    "ZERO_SHOT_IMAGE_CLASSIFICATION", "TIME_SERIES_PREDICTION", "TEXT_TO_WAVEFORM", "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM", "PRETRAINING",
)  # fmt: skip
LENGTH = 7


def cases() -> Iterator[Case]:
    """One case for each model type of the installed transformers; none where it is not installed."""
    try:
        from transformers.models.auto import modeling_auto
    except ImportError:
        return
    for model_type in sorted(modeling_auto.MODEL_MAPPING_NAMES):
        name = class_name(modeling_auto, model_type)
        yield Case(f"transformers/{model_type}", partial(_build, model_type, name), name)


def class_name(collections: Any, model_type: str) -> str:
    """The class that stands for a model type."""
    if model_type in HEADS:
        return HEADS[model_type]
    for collection in COLLECTIONS:
        names = getattr(collections, f"MODEL_FOR_{collection}_MAPPING_NAMES", {})
        names = names or getattr(collections, f"MODEL_{collection}_MAPPING_NAMES", {})
        if model_type in names:
            break
    else:
        names = collections.MODEL_MAPPING_NAMES
    name = names[model_type]
    return name if isinstance(name, str) else name[0]


def _build(model_type: str, name: str) -> Built:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if model_type in LEFT_OUT:
        raise NoCaseError(LEFT_OUT[model_type])
    torch.manual_seed(0)
    try:
        config_class = CONFIG_MAPPING[model_type]
        config = shrunk(config_class, CONFIGS.get(model_type, dict)())
        model_class = getattr(transformers, name, None) or _class_in_module(config_class, name)
        with torch.device("meta"):
            count = sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters())
        if count > 6_000_000:
            raise NoCaseError(f"its tiny configuration still has {count:,} parameters")
        model = model_class(config)
    except NoCaseError:
        raise
    except Exception as error:
        raise NoCaseError(f"it cannot be made tiny: {type(error).__name__}: {error}") from error
    model = fill(model)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = None  # all rows are generated to the end
        model.generation_config.forced_eos_token_id = None
    candidates = [INPUTS[model_type]] if model_type in INPUTS else list(_candidates(model, config))
    problems = []
    for make in candidates:
        inputs = partial(_inputs, make)
        try:
            plain = inputs(0, 2)
            with torch.no_grad():
                copy.deepcopy(model)(*plain[0], **plain[1])
        except Exception as error:
            problems.append(f"{'+'.join(make(2, 0)) if not isinstance(error, KeyError) else ''}: {error!r}"[:200])
            continue
        generates = (
            name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
            and name not in MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()
            and model.main_input_name == "input_ids"
            and model.can_generate()
        )
        return Built(model, inputs, _batch_dims(plain), generates=generates)
    raise NoCaseError("no inputs suit it: " + "; ".join(problems)[:500])


def _class_in_module(config_class: Any, name: str) -> Any:
    import importlib

    package = config_class.__module__.rsplit(".", 1)[0]
    return getattr(importlib.import_module(f"{package}.modeling_{package.rsplit('.', 1)[1]}"), name)


def _inputs(make: Any, member: int, rows: int) -> Inputs:
    """One member's inputs: keyword arguments from ``make(rows, seed)``, without a cache."""
    return (), make(rows, 17 * member + rows)


def _batch_dims(plain: Inputs) -> list[int | None]:
    return [0 if isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == 2 else None for x in tree_flatten(plain)[0]]


def _candidates(model: nn.Module, config: Any) -> Iterator[Any]:
    """Inputs that a module may take, by the names of its arguments; the likely ones first."""
    names = set(inspect.signature(model.forward).parameters)
    main = getattr(model, "main_input_name", "input_ids")
    fixed = {key: False for key in ("use_cache",) if key in names}
    text = partial(_text, names=names, config=config, fixed=fixed)
    image = partial(_image, config=config, fixed=fixed)
    makers = {"input_ids": [text], "pixel_values": [image], "pixel_values_videos": [partial(_video, config=config)]}
    if isinstance(main, str) and main in makers:  # some name several
        yield from makers[main]
    if {"input_values", "input_features", "inputs"} & names:
        yield from _audio(names, config, fixed)
    if "input_ids" in names and main != "input_ids":
        yield text
    if "pixel_values" in names and "input_ids" in names:
        yield partial(_both, text=text, image=image)
        yield text
    if "hidden_states" in names or "inputs_embeds" in names:
        key = "hidden_states" if "hidden_states" in names else "inputs_embeds"
        yield partial(_hidden, key=key, config=config)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _text(rows: int, seed: int, *, names: set[str], config: Any, fixed: Mapping[str, Any]) -> dict[str, Any]:
    vocabulary = getattr(getattr(config, "text_config", None) or config, "vocab_size", VOCABULARY)
    vocabulary = min(vocabulary, 80) if isinstance(vocabulary, int) and vocabulary > 3 else 80
    ids = torch.randint(3, vocabulary, (rows, LENGTH), generator=_generator(seed))
    made: dict[str, Any] = {"input_ids": ids, **fixed}
    if "attention_mask" in names:
        mask = torch.ones_like(ids)
        if rows > 1:
            padded = slice(None, 2) if "decoder_input_ids" not in names and "labels" in names else slice(-2, None)
            mask[0, padded] = 0
        made["attention_mask"] = mask
    if "bbox" in names:
        corners = torch.randint(0, 50, (rows, LENGTH, 2), generator=_generator(seed + 1))
        made["bbox"] = torch.cat([corners, corners + 5], -1)
    if "decoder_input_ids" in names:
        made["decoder_input_ids"] = torch.randint(3, vocabulary, (rows, 5), generator=_generator(seed + 2))
    return made


def image_size(config: Any) -> tuple[int, int]:
    """Height and width that a configuration asks for."""
    for part in (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None)):
        size = getattr(part, "image_size", None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, list | tuple) and len(size) == 2:
            return size[0], size[1]
    return 32, 32


def _image(rows: int, seed: int, *, config: Any, fixed: Mapping[str, Any]) -> dict[str, Any]:
    channels = getattr(config, "num_channels", None) or getattr(
        getattr(config, "vision_config", None), "num_channels", None
    )
    shape = (rows, channels if isinstance(channels, int) else 3, *image_size(config))
    return {"pixel_values": torch.randn(shape, generator=_generator(seed))}


def _video(rows: int, seed: int, *, config: Any) -> dict[str, Any]:
    frames = getattr(config, "num_frames", 4)
    return {"pixel_values_videos": torch.randn((rows, frames, 3, *image_size(config)), generator=_generator(seed))}


def _both(rows: int, seed: int, *, text: Any, image: Any) -> dict[str, Any]:
    return {**text(rows, seed), **image(rows, seed + 5)}


def _audio(names: set[str], config: Any, fixed: Mapping[str, Any]) -> Iterator[Any]:
    bins = next(
        (
            getattr(config, key)
            for key in (
                "num_mel_bins",
                "feature_size",
                "num_mels",
                "input_feat_per_channel",
                "feature_projection_input_dim",
            )
            if isinstance(getattr(config, key, None), int)
        ),
        16,
    )
    key = next(k for k in ("input_values", "input_features", "inputs") if k in names)

    def maker(*shape: int) -> Any:
        def make(rows: int, seed: int) -> dict[str, Any]:
            made: dict[str, Any] = {key: torch.randn((rows, *shape), generator=_generator(seed)), **fixed}
            if "decoder_input_ids" in names:
                made["decoder_input_ids"] = torch.randint(3, 80, (rows, 5), generator=_generator(seed + 2))
            return made

        return make

    shapes = [(bins, 64), (64, bins), (1600,), (1, 1600), (bins, 3000)]
    for shape in shapes if key == "input_features" else [(1600,), (1, 1600), *shapes]:
        yield maker(*shape)


def _hidden(rows: int, seed: int, *, key: str, config: Any) -> dict[str, Any]:
    width = getattr(config, "hidden_size", getattr(config, "d_model", 32))
    return {key: torch.randn((rows, LENGTH, width), generator=_generator(seed))}
