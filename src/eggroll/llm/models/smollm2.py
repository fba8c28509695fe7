"""SmolLM2-135M-Instruct without a hub: the packaged GGUF file, expanded once into an ordinary model directory.

The directory in the cache loads in a second, where the file takes fifteen.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from eggroll._environment import cache_directory
from eggroll._optional import require
from eggroll.llm.models import packaged
from eggroll.llm.models.hub import dense_gguf, drop_quantization, quiet_progress

CONVERTED = "SmolLM2-135M-Instruct"
"""Directory of the converted model. Its name becomes a title, hence the capitals."""
FINISHED = "config.json"
_BYTES = 800_000_000


def directory() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory in float32.

    Raises:
        ModelError: it can neither be found nor fetched, or the cache cannot be written.
    """
    target = cache_directory() / CONVERTED
    if not is_cached():
        with packaged.SMOLLM2.writing(_BYTES) as scratch:
            if not is_cached():
                cached = packaged.SMOLLM2.target if packaged.SMOLLM2.is_cached else packaged.SMOLLM2.fetch(scratch)
                _convert(cached, scratch / CONVERTED)
                _publish(scratch / CONVERTED, target)
    return target


def is_cached() -> bool:
    """Whether :func:`directory` answers at once; else it fetches 98 MB and converts them for about 20 s."""
    return (cache_directory() / CONVERTED / FINISHED).exists()


def _convert(gguf: Path, target: Path) -> None:
    """Turns the GGUF file into a directory that plain transformers loads."""
    transformers: Any = require("transformers", extra="llm")
    with quiet_progress():
        model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, **dense_gguf())
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        drop_quantization(model)
        model.config.name_or_path = CONVERTED
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _publish(staging: Path, target: Path) -> None:
    """Moves the finished directory into its place, unless another process was first."""
    try:
        staging.rename(target)
    except OSError:
        if not (target / FINISHED).exists():
            # an unfinished directory, left by something else than this function
            shutil.rmtree(target, ignore_errors=True)
            staging.rename(target)
