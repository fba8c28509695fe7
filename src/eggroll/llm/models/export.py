"""Writing a model as a plain Hugging Face directory, with a card that says how it came to be."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from importlib import metadata as packages
from pathlib import Path
from typing import Any

from eggroll._optional import DISTRIBUTION, require
from eggroll.errors import DataError, ModelError
from eggroll.llm.generation.chat import apply_template, templates_in_time
from eggroll.llm.models.gguf_file import changed_beyond, expanded, save_gguf
from eggroll.llm.models.hub import drop_quantization, quiet_progress
from eggroll.torch.quantized.adopt import released

METADATA_FILE = "eggroll.json"
GGUF_FILE = "model.gguf"
"""The name of a model that is saved as GGUF, as it came."""
AUTO_CLASSES = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}
"""Classes of transformers that load models with a generation head, and their tables of what they load."""


def save_pretrained(model: Any, tokenizer: Any, directory: str | Path, *, metadata: Mapping[str, Any]) -> Path:
    """Write weights, configuration, tokenizer, a model card and ``eggroll.json``.

    Everything is written beside the directory first and moved in at the end, so that a full disk or an interruption
    leaves what was there before.

    Args:
        model: a transformers model.
        tokenizer: its tokenizer, or ``None``.
        directory: where to; made if it does not exist. Files of the same names are replaced.
        metadata: how the model was trained, as JSON values. ``base_model`` names what it started from; ``reward``,
            ``heldout_before``, ``heldout_after``, ``kept`` (which generation it is, in words) and ``config`` are shown
            in the card.

    Returns:
        The directory. The line of :func:`load_line` loads it, those of :func:`answer_lines` ask it something.

    Raises:
        ModelError: it cannot be written.
    """
    target = Path(directory).expanduser()
    if target.exists() and not target.is_dir():
        raise ModelError(f"the model cannot be saved to {target}: it is a file; give a directory")
    drop_quantization(model)
    staging: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        with quiet_progress():
            if not _saved_as_gguf(model):
                kept = hasattr(model, "gguf_source")
                with expanded(model) if kept else released(model):
                    model.save_pretrained(staging)
                if tokenizer is not None:
                    tokenizer.save_pretrained(staging)
            else:  # one file with everything in it
                save_gguf(model, staging / GGUF_FILE)
        details = {"eggroll_version": _version(), "auto_class": auto_class(model), **metadata}
        details["prompt_form"] = prompt_form(tokenizer, trained_with(details))
        (staging / METADATA_FILE).write_text(json.dumps(details, indent=2, default=str) + "\n", encoding="utf-8")
        (staging / "README.md").write_text(_card(model, target, details), encoding="utf-8")
        target.mkdir(exist_ok=True)
        for file in sorted(staging.iterdir()):
            _readable(file)
            os.replace(file, target / file.name)
    except OSError as error:
        raise ModelError(f"the model cannot be saved to {target}: {error}. Give another directory") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def _saved_as_gguf(model: Any) -> bool:
    """Whether a model came from a GGUF file that can hold it as it is now."""
    return getattr(model, "gguf_source", None) is not None and not changed_beyond(model)


def auto_class(model: Any) -> str:
    """The class of transformers whose ``from_pretrained`` loads a saved model as what it is.

    Another one would raise, or load a part of it with new weights for the rest (a decoder without its encoder).
    """
    name, config = type(model).__name__, getattr(model, "config", None)
    remote = getattr(config, "auto_map", None) or {}
    own = [auto for auto, path in remote.items() if auto.startswith("AutoModel") and str(path).endswith(f".{name}")]
    transformers: Any = require("transformers", extra="llm")
    from transformers.models.auto import modeling_auto

    for auto, names in AUTO_CLASSES.items():
        found = getattr(modeling_auto, names, {}).get(getattr(config, "model_type", None), ())
        if name in ((found,) if isinstance(found, str) else found):
            own.append(auto)
    if own:
        return own[0]
    if hasattr(transformers, name):
        return name
    return "AutoModelForSeq2SeqLM" if getattr(config, "is_encoder_decoder", False) else "AutoModelForCausalLM"


OWN_MODELS = frozenset({"rwkv7"})
"""Model types of which transformers has no class; :func:`eggroll.llm.load` has."""


def load_line(directory: str | Path) -> str:
    """The line of Python that loads a saved model: with the class that was noted when it was saved, if one was."""
    folder = Path(directory)
    if _read_json(folder / "config.json").get("model_type") in OWN_MODELS:
        return f'eggroll.llm.load("{directory}").model'
    auto = _read_json(folder / METADATA_FILE).get("auto_class")
    if not isinstance(auto, str) or not auto.isidentifier():  # saved by an older version, or by something else
        encoder_decoder = _read_json(folder / "config.json").get("is_encoder_decoder") is True
        auto = "AutoModelForSeq2SeqLM" if encoder_decoder else "AutoModelForCausalLM"
    return _load_line(auto, directory, (folder / GGUF_FILE).exists())


def _load_line(auto: str, directory: str | Path, gguf: bool = False) -> str:
    return f'{auto}.from_pretrained("{directory}"' + (f', gguf_file="{GGUF_FILE}")' if gguf else ")")


PROMPT_FORMS = ("chat", "chat without system", "text")
"""How a question is put: by the chat template; by one that knows no system role; as it is."""
KEPT: Mapping[str, type] = {"system": str, "chat": bool, "max_tokens": int, "max_length": int}
"""The settings that a model answers with, and their types in ``eggroll.json``, which may come from anyone."""
QUESTION = "What is rain?"
"""What the printed lines ask."""


def trained_with(details: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of :data:`KEPT` that a model was trained with, from the contents of its ``eggroll.json``."""
    config = details.get("config")
    found = config if isinstance(config, Mapping) else {}
    return {name: found[name] for name, kind in KEPT.items() if type(found.get(name)) is kind}


def settings_of(directory: str | Path) -> dict[str, Any]:
    """:func:`trained_with` for a directory; empty for a model that eggroll did not save."""
    return trained_with(_read_json(Path(directory) / METADATA_FILE))


def prompt_form(tokenizer: Any, settings: Mapping[str, Any]) -> str | None:
    """Which of :data:`PROMPT_FORMS` a model was trained with; ``None`` without a tokenizer.

    Args:
        tokenizer: the model's.
        settings: of :func:`trained_with`.
    """
    if tokenizer is None:
        return None
    has_template, chat = bool(getattr(tokenizer, "chat_template", None)), settings.get("chat")
    if not has_template or chat is False:
        return "text"
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    try:
        with templates_in_time(1):
            apply_template(tokenizer, turns, {})
    except DataError:
        return "chat without system"
    return "chat"


def answer_lines(directory: str | Path) -> str:
    """The whole way from a saved model to an answer, in Python: tokenizer, system prompt and template included.

    What cannot be asked in words (a classifier, a model without a tokenizer) is only loaded.
    """
    folder = Path(directory)
    details = _read_json(folder / METADATA_FILE)
    config = _read_json(folder / "config.json")
    own, gguf = config.get("model_type") in OWN_MODELS, (folder / GGUF_FILE).exists()
    auto = "" if own else load_line(directory).partition(".")[0]
    return _answer_lines(str(directory), auto, gguf, details)


def _answer_lines(place: str, auto: str, gguf: bool, details: Mapping[str, Any]) -> str:
    """As :func:`answer_lines`; ``auto`` is empty for :data:`OWN_MODELS`."""
    form = details.get("prompt_form", "not noted")  # by an older version
    lines = _which(details)
    if auto:
        names = auto if form is None else f"{auto}, AutoTokenizer"
        lines += [f"from transformers import {names}", "", f"model = {_load_line(auto, place, gguf)}"]
        lines += [] if form is None else [f"tokenizer = {_load_line('AutoTokenizer', place, gguf)}"]
    else:
        lines += ["import eggroll.llm", "", f'loaded = eggroll.llm.load("{place}")']
        lines += ["model, tokenizer = loaded.model, loaded.tokenizer"]
    if form not in PROMPT_FORMS or auto not in ("", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        return "\n".join(lines)
    settings = trained_with(details)
    system = settings.get("system") or ""
    device = "" if auto else ".to(model.device)"
    question = f"{system}\n\n{QUESTION}" if system and form != "chat" else QUESTION
    if form == "text":
        lines.append(f'ids = tokenizer({json.dumps(question)}, return_tensors="pt"){device}')
    else:
        turns = [{"role": "system", "content": system}] if system and form == "chat" else []
        lines += [
            f"chat = {json.dumps([*turns, {'role': 'user', 'content': question}])}",
            f"ids = tokenizer.apply_chat_template(\n"
            f'    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True\n){device}',
        ]
    longest = settings.get("max_tokens", 128)
    lines.append(f"answer = model.generate(**ids, max_new_tokens={longest}, do_sample=False)")
    new = "answer[0, 1:]" if auto == "AutoModelForSeq2SeqLM" else 'answer[0, ids["input_ids"].shape[1] :]'
    lines.append(f"print(tokenizer.decode({new}, skip_special_tokens=True))")
    return "\n".join(lines)


def _which(details: Mapping[str, Any]) -> list[str]:
    """A comment that says which generation of its run a model is, if that was noted and is one line of plain text."""
    kept, generation = details.get("kept"), details.get("generations")
    if type(kept) is not str or type(generation) is not int or not kept.isprintable():
        return []
    return [f"# generation {generation}: {kept}"]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _readable(path: Path) -> None:
    """Temporary directories, and the weights in them, are private to the user; a model is as readable as any file."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _version() -> str:
    try:
        return packages.version(DISTRIBUTION)
    except packages.PackageNotFoundError:
        return "unknown"


def _card(model: Any, target: Path, details: Mapping[str, Any]) -> str:
    """A model card: YAML for the hub, then text for people. JSON strings are valid YAML."""
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    base = str(details.get("base_model", ""))
    head = ["---", "library_name: transformers", "tags: [eggroll, evolution-strategies]"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists():
        head.append(f"base_model: {json.dumps(base)}")
    head += [f"pipeline_tag: {'text2text-generation' if encoder_decoder else 'text-generation'}", "---"]
    own = getattr(model.config, "model_type", None) in OWN_MODELS
    gguf = _saved_as_gguf(model)
    code = _answer_lines(target.name, "" if own else str(details["auto_class"]), gguf, details)
    started = f", starting from `{base}`" if base else ""
    parts = [
        f"# {target.name}",
        f"This model was trained by [EGGROLL](https://arxiv.org/abs/2511.16652), evolution strategies with low-rank "
        f"perturbations, that is without gradients{started}. It was written by eggroll {details['eggroll_version']}.",
        *_table(
            {
                key: details[key]
                for key in ("reward", "generations", "heldout_before", "heldout_after", "kept")
                if key in details
            }
        ),
        "## Ask it" if details.get("prompt_form") else "## Load it",
        f"```python\n{code}\n```",
    ]
    config = details.get("config")
    if isinstance(config, Mapping):
        parts += ["## How it was trained", *_table(config)]
    parts.append(f"All details are in `{METADATA_FILE}`.")
    return "\n".join(head) + "\n\n" + "\n\n".join(parts) + "\n"


def card_for_hub(directory: Path, repo_id: str) -> str:
    """The card of a saved model with the lines that load it from a repository of the hub."""
    name = directory.name
    text = (directory / "README.md").read_text(encoding="utf-8")
    text = text.replace(f"\n# {name}\n", f"\n# {repo_id.rpartition('/')[2]}\n", 1)
    for call in ("from_pretrained", "eggroll.llm.load"):
        text = text.replace(f'{call}("{name}"', f'{call}("{repo_id}"')
    return text


def _table(values: Mapping[str, Any]) -> list[str]:
    if not values:
        return []
    rows = [f"| {key} | {_cell(value)} |" for key, value in values.items()]
    return ["\n".join(["| | |", "|---|---|", *rows])]


def _cell(value: Any) -> str:
    text = (
        f"{value:.6g}"
        if isinstance(value, float)
        else value
        if isinstance(value, str)
        else json.dumps(value, default=str)
    )
    return text.replace("|", "\\|").replace("\n", " ")
