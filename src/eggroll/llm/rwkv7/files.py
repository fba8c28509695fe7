"""RWKV-7 models and tokenizers from files: BlinkDL's ``.pth``, and Hugging Face directories in the layouts in use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from eggroll.core.rwkv7 import layout_of, sizes_of
from eggroll.errors import ModelError
from eggroll.llm.rwkv7.config import RWKV7Config
from eggroll.llm.rwkv7.model import RWKV7ForCausalLM
from eggroll.llm.rwkv7.tokenizer import VOCABULARY, RWKV7Tokenizer
from eggroll.llm.rwkv7.weights import fill, read_pth


def register() -> None:
    """Let transformers' automatic classes know RWKV-7, so that its directories load without code of their own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoConfig.register("rwkv7", RWKV7Config, exist_ok=True)
    AutoModelForCausalLM.register(RWKV7Config, RWKV7ForCausalLM, exist_ok=True)


def config_of_pth(path: str | Path) -> RWKV7Config:
    """The configuration that an original file's shapes say.

    Raises:
        ModelError: it is no RWKV-7 model.
    """
    tensors = read_pth(path)
    if layout_of(tensors, str(path)) == "fla":
        raise ModelError(f"{path} has Hugging Face's names; give the directory that it belongs to")
    return RWKV7Config(**sizes_of(tensors, str(path)))


def load_pth(path: str | Path, config: RWKV7Config, dtype: torch.dtype) -> RWKV7ForCausalLM:
    """The model of an original file, given its configuration (:func:`config_of_pth`)."""
    with torch.device("meta"):
        model = RWKV7ForCausalLM(config)
    fill(model, read_pth(path), dtype, str(path))
    return model.eval()


def load_tokenizer(location: str | None) -> Any:
    """The tokenizer of a directory or hub id: its own, or that of the World models.

    Args:
        location: ``None`` for an original file, which has none of its own.
    """
    from transformers import PreTrainedTokenizerFast
    from transformers.utils.hub import cached_file

    def file(name: str) -> str | None:
        return cached_file(location, name, _raise_exceptions_for_missing_entries=False) if location else None

    if file("tokenizer.json"):
        return PreTrainedTokenizerFast.from_pretrained(location)
    template = file("chat_template.jinja")
    chat = {"chat_template": Path(template).read_text(encoding="utf-8")} if template else {}
    return RWKV7Tokenizer(file(VOCABULARY), **chat)
