"""What a model's generation config asks for, and what becomes of it: one policy for every way of generating.

- Which tokens may come, and what speaks against them (``repetition_penalty``, ``no_repeat_ngram_size``,
  ``suppress_tokens``, forced tokens, least lengths, ...: :data:`APPLIED`) is a part of the model and is applied, by
  transformers' own logits processors, whether this package decodes or the model's ``generate``.
- How a token is chosen, how many answers there are and how long they may be is said by this package's settings
  (``temperature``, ``max_tokens``, ``samples_per_prompt``). What a generation config says about that (``do_sample``,
  ``top_p``, ``num_beams``, ``num_return_sequences``, ``max_length``, ...) is not used, and a line names it.

Rows that are padded get what they would get alone: processors never see padding.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eggroll.errors import ModelError

__all__ = ["APPLIED", "GenerationDefaults", "Processing"]

APPLIED: Mapping[str, Any] = {
    "sequence_bias": None,
    "encoder_repetition_penalty": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
"""Settings that are applied, in the order in which transformers does it, and the values that change nothing."""

IDS = ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty", "constraints", "force_words_ids")
UNNAMED = (
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "renormalize_logits", "low_memory",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "compile_config", "disable_compile", "continuous_batching_config", "prefill_chunk_size", "speculation_type",
    "transformers_version", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "assistant_early_exit",
    "assistant_ensemble_weight", "prompt_lookup_num_tokens", "max_matching_ngram_size", "use_mtp",
)  # fmt: skip
"""How an answer is computed, which does not change it."""
NEUTRAL: Mapping[str, Any] = {
    "num_beams": 1, "num_return_sequences": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0,
    "length_penalty": 1.0, "num_beam_groups": 1, "guidance_scale": 1.0,
}  # fmt: skip
VLLM = {"repetition_penalty": "repetition_penalty", "min_new_tokens": "min_tokens"}
"""The settings that vLLM knows too, and what it calls them."""


@dataclass(frozen=True)
class GenerationDefaults:
    """A generation config, sorted into what is applied and what this package's settings take the place of.

    Attributes:
        applied: settings of :data:`APPLIED` that change something.
        overridden: others that would change what is generated.
    """

    applied: Mapping[str, Any] = field(default_factory=dict)
    overridden: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, generation_config: Any, temperature: float = 0.0) -> GenerationDefaults:
        """Sort a model's generation config (or ``None``) for answers with this temperature.

        Raises:
            ModelError: a setting has a value that transformers' processor of it refuses.
        """
        if generation_config is None:
            return cls()
        values = {key: value for key, value in generation_config.to_dict().items() if not key.startswith("_")}
        usual = type(generation_config)().to_dict()
        applied = {
            name: values[name]
            for name, nothing in APPLIED.items()
            if values.get(name) is not None and values[name] != nothing
        }
        overridden = {
            name: value
            for name, value in values.items()
            if name in usual and name not in (*APPLIED, *IDS, *UNNAMED) and not _is_neutral(name, value, usual[name])
        }
        samples, beams = bool(values.get("do_sample")), (values.get("num_beams") or 1) > 1
        unused = {*(() if samples else SAMPLING), *(() if beams else BEAMS)}  # unused by transformers as well
        if temperature > 0.0:
            unused |= {"do_sample", *(("temperature",) if values.get("temperature") == temperature else ())}
        found = cls(applied, {name: value for name, value in overridden.items() if name not in unused})
        found.processors(torch.zeros((1, 1), dtype=torch.long), max_tokens=1, ends=[0])
        return found

    def notes(self, *, vllm: bool = False) -> list[str]:
        """One line that names what is applied and what is not, or none if there is nothing to say."""
        applied = {name: value for name, value in self.applied.items() if not vllm or name in VLLM}
        missing = {name: value for name, value in self.applied.items() if name not in applied}
        parts = [
            f"{_listed(values)} {'is' if len(values) == 1 else 'are'} {what}"
            for values, what in (
                (applied, "applied"),
                (missing, "not applied, since vLLM has nothing like it"),
                (self.overridden, "not used (temperature, max_tokens and samples_per_prompt count instead)"),
            )
            if values
        ]
        return [f"the model's generation config: {'; '.join(parts)}"] if parts else []

    def vllm_arguments(self) -> dict[str, Any]:
        """What is applied, as arguments of ``vllm.SamplingParams``."""
        return {VLLM[name]: value for name, value in self.applied.items() if name in VLLM}

    def processors(
        self, prompt: Tensor, *, max_tokens: int, ends: Sequence[int], encoder_ids: Tensor | None = None
    ) -> Any:
        """Transformers' logits processors for rows without padding, as its ``generate`` makes them.

        Args:
            prompt: ``(R, T)``, what the decoder begins with.
            max_tokens: that will be made at most.
            ends: tokens that end an answer.
            encoder_ids: ``(R, S)``, what an encoder has read; the prompt without one.

        Raises:
            ModelError: a setting has a value that its processor refuses.
        """
        from transformers.generation import logits_process as known

        device, length = prompt.device, prompt.shape[1]
        read = prompt if encoder_ids is None else encoder_ids
        end = torch.tensor(list(ends), dtype=torch.long, device=device)
        begins = length + 1 if length == 1 and "forced_bos_token_id" in self.applied else length
        makers: dict[str, Any] = {
            "sequence_bias": known.SequenceBiasLogitsProcessor,
            "encoder_repetition_penalty": lambda value: known.EncoderRepetitionPenaltyLogitsProcessor(
                float(value), read
            ),
            "repetition_penalty": lambda value: known.RepetitionPenaltyLogitsProcessor(float(value)),
            "no_repeat_ngram_size": known.NoRepeatNGramLogitsProcessor,
            "encoder_no_repeat_ngram_size": lambda value: known.EncoderNoRepeatNGramLogitsProcessor(value, read),
            "bad_words_ids": lambda value: known.NoBadWordsLogitsProcessor(value, end if len(end) else None),
            "min_length": lambda value: known.MinLengthLogitsProcessor(value, end, device=str(device)),
            "min_new_tokens": lambda value: known.MinNewTokensLengthLogitsProcessor(
                length, value, end, device=str(device)
            ),
            "forced_bos_token_id": known.ForcedBOSTokenLogitsProcessor,
            "forced_eos_token_id": lambda value: known.ForcedEOSTokenLogitsProcessor(
                length + max_tokens, value, device=str(device)
            ),
            "remove_invalid_values": lambda value: known.InfNanRemoveLogitsProcessor(),
            "exponential_decay_length_penalty": lambda value: known.ExponentialDecayLengthPenalty(
                tuple(value), end, length
            ),
            "suppress_tokens": lambda value: known.SuppressTokensLogitsProcessor(value, device=str(device)),
            "begin_suppress_tokens": lambda value: known.SuppressTokensAtBeginLogitsProcessor(
                value, begins, device=str(device)
            ),
        }
        needs_end = ("min_length", "min_new_tokens", "exponential_decay_length_penalty")
        made = known.LogitsProcessorList()
        for name, value in self.applied.items():
            if name in needs_end and not len(end):
                continue  # nothing ends an answer, so nothing has to be kept from ending it
            try:
                made.append(makers[name](value))
            except (ValueError, TypeError, RuntimeError) as error:
                raise ModelError(
                    f"the model's generation config has {name}={_shown(value)}, which cannot be applied: {error}. "
                    "Correct it in generation_config.json (or in model.generation_config), or leave it out there"
                ) from error
        return made

    @staticmethod
    def plain(generation_config: Any, **changes: Any) -> Any:
        """A copy of a generation config that keeps its special tokens, with nothing else but ``changes``."""
        made, usual = copy.deepcopy(generation_config), type(generation_config)()
        for name in usual.to_dict():
            if name not in (*IDS, "transformers_version"):
                setattr(made, name, getattr(usual, name, None))
        for name, value in changes.items():
            setattr(made, name, value)
        return made


class Processing:
    """The processors of a batch: each row gets what it would get alone, without its padding.

    Args:
        defaults: what is applied.
        prompt: ``(R, T)`` what the decoder begins with.
        mask: ``(R, T)``, 0 for padding, on the left.
        max_tokens: that will be made at most.
        ends: tokens that end an answer.
        encoder: ids and mask ``(R, S)`` of what an encoder has read, padded on the right.
    """

    def __init__(
        self,
        defaults: GenerationDefaults,
        prompt: Tensor,
        mask: Tensor,
        *,
        max_tokens: int,
        ends: Sequence[int],
        encoder: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.defaults, self.prompt, self.max_tokens, self.ends = defaults, prompt, max_tokens, ends
        self.encoder_ids = None if encoder is None else encoder[0]
        # Rows with the same padding go together.
        self.kept = (mask if encoder is None else encoder[1]).sum(-1)
        self.lengths = mask.sum(-1)
        self._groups: list[tuple[Tensor, int, Any]] = []
        self._rows = -1

    def __call__(self, made: Tensor, scores: Tensor, rows: Tensor) -> Tensor:
        """Logits with the processors applied: ``(r, V)``.

        Args:
            made: ``(r, t)`` tokens so far of the rows that are left.
            scores: ``(r, V)`` logits.
            rows: ``(r,)`` which rows these are; there are never more than before.
        """
        if len(rows) != self._rows:
            self._group(rows)
        out = torch.empty_like(scores)
        for places, length, processors in self._groups:
            ids = torch.cat([self._begin(rows[places], length), made[places]], dim=1)
            out[places] = processors(ids, scores[places])
        return out

    def _begin(self, rows: Tensor, length: int) -> Tensor:
        return self.prompt[rows, self.prompt.shape[1] - length :]

    def _group(self, rows: Tensor) -> None:
        self._rows, self._groups = len(rows), []
        for kept in self.kept[rows].unique().tolist():
            places = (self.kept[rows] == kept).nonzero().squeeze(1)
            length = int(self.lengths[rows[places[0]]])
            read = None if self.encoder_ids is None else self.encoder_ids[rows[places], :kept]
            processors = self.defaults.processors(
                self._begin(rows[places], length), max_tokens=self.max_tokens, ends=self.ends, encoder_ids=read
            )
            self._groups.append((places, length, processors))


def _is_neutral(name: str, value: Any, usual: Any) -> bool:
    return value is None or value is False or value == usual or value in (0, NEUTRAL.get(name))


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_shown(value)}" for name, value in values.items())


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
