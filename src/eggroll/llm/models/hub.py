"""The Hugging Face hub, for machines that cannot reach it."""

from __future__ import annotations

import os
import socket
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from eggroll._optional import require


@contextmanager
def offline_if_unreachable() -> Iterator[bool]:
    """While this lasts, hub look-ups use only what is cached, if the hub's name cannot even be resolved.

    Otherwise each look-up would retry for half a minute before it fails. Yields whether the hub may be reached.
    """
    modules: list[Any] = [require("huggingface_hub.constants", extra="llm")]
    if "datasets.config" in sys.modules:
        modules.append(sys.modules["datasets.config"])
    before = [module.HF_HUB_OFFLINE for module in modules]
    reachable = not before[0] and _resolvable(modules[0].ENDPOINT)
    if not reachable:
        for module in modules:
            module.HF_HUB_OFFLINE = True
    try:
        yield reachable
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def dense_gguf() -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that turn a GGUF file into ordinary weights.

    Newer versions of transformers keep some files' weights packed where they find a kernel, and packed weights cannot
    be perturbed.
    """
    for needed in ("gguf", "accelerate"):
        require(needed, extra="llm")
    config = getattr(require("transformers", extra="llm"), "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def drop_quantization(model: Any) -> None:
    """Forget that a model was read from quantized weights.

    A GGUF file is turned into ordinary weights while it is read, but the model keeps the quantizer, and then neither
    saves nor loads again.
    """
    config: Any = getattr(model, "config", None)
    quantization = getattr(config, "quantization_config", None)
    method = (
        quantization.get("quant_method")
        if isinstance(quantization, dict)
        else getattr(quantization, "quant_method", "")
    )
    if "gguf" not in str(getattr(method, "value", method)).lower():
        return
    del config.quantization_config
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    model.is_quantized = False


@contextmanager
def quiet_progress() -> Iterator[None]:
    """Hides the progress bars of transformers and the hub; whoever loads a model has a display of its own."""
    logging = require("transformers.utils.logging", extra="llm")
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def offline_hint() -> str:
    """Why the hub is not asked, for messages; empty if it is."""
    if os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE"):
        return " (HF_HUB_OFFLINE is set)"
    endpoint = require("huggingface_hub.constants", extra="llm").ENDPOINT
    return "" if _resolvable(endpoint) else f" ({urlsplit(endpoint).hostname} cannot be reached from here)"


def _resolvable(endpoint: str) -> bool:
    if urllib.request.getproxies():
        return True  # the proxy resolves names
    parts = urlsplit(endpoint)
    try:
        socket.getaddrinfo(parts.hostname, parts.port or 443)
    except OSError:
        return False
    return True
