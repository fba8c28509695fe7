"""Generated text for a whole population, without computing rows that have finished.

The members' rows are decoded together with a KV cache. A beginning that all prompts share (a system prompt, worked
examples) is computed once per member, not once per prompt. When enough rows have ended, they are cut out of the cache,
the mask and the population's factors, so a member that says little costs little. The cache has room to grow, and on
CPUs the attention of a step is one C call a layer, where the model takes attention functions. A recurrent state that
can be cut by rows (RWKV-7) takes the place of the cache. Models that have neither (T5, Mamba) go through their own
``generate``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eggroll.core.threefry import fold_in, seed_key
from eggroll.llm.generation.attention import decoding_attention
from eggroll.llm.generation.defaults import GenerationDefaults, Processing
from eggroll.llm.generation.memory import Memory
from eggroll.llm.generation.prefix import common_prefix, plain_cache, spread
from eggroll.torch.threefry import random_bits

COMPACT_FRACTION = 0.2
"""Finished rows are cut out when they are this part of the computed ones: each cut copies the cache once."""
SAMPLING_STREAM = 0x5A3F1E
"""Keeps the bits of sampled tokens apart from those of the perturbations."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedy at temperature 0, else by inverse distribution function at an addressed uniform.

    ``keys`` is ``(rows, 2)``: one key per row, so that a row's tokens do not depend on its neighbors.
    """

    temperature: float = 0.0
    keys: np.ndarray | None = None

    @classmethod
    def for_rows(cls, temperature: float, seed: int, generation: int, rows: Sequence[int], turn: int = 0) -> Sampling:
        """Keys for rows that are numbered through a generation (member times prompts plus prompt), and for a turn."""
        if temperature == 0.0:
            return cls()
        base = fold_in(fold_in(seed_key(seed), SAMPLING_STREAM), generation)
        keys = [fold_in(base, row) for row in rows]
        return cls(temperature, np.array([fold_in(key, turn) if turn else key for key in keys], dtype=np.uint32))

    def choose(self, logits_RV: Tensor, step: int, rows: Tensor) -> Tensor:
        """The next token of each row: ``(R,)``."""
        if self.keys is None:
            return logits_RV.argmax(dim=-1)
        bits = random_bits(self.keys[rows.cpu().numpy()], 1, device=logits_RV.device, start=step)
        uniform = ((bits.to(torch.int64) & 0xFFFFFFFF).double() + 0.5) / 2**32
        probabilities = torch.softmax(logits_RV.double() / self.temperature, dim=-1)
        chosen = torch.searchsorted(probabilities.cumsum(-1), uniform).squeeze(-1)
        return chosen.clamp_max(logits_RV.shape[-1] - 1)


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    max_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    sampling: Sampling | None = None,
    select_rows: Callable[[Tensor], None] | None = None,
    prompts: int | None = None,
    defaults: GenerationDefaults | None = None,
    memory: Memory | None = None,
) -> list[list[int]]:
    """Continue every row until it ends or ``max_tokens`` are made.

    Args:
        model: a Hugging Face model with a generation head, its parameters possibly standing for a population.
        input_ids: ``(R, T)`` prompts, padded on the left; for an encoder, on the right.
        attention_mask: ``(R, T)``, 0 for padding.
        max_tokens: longest continuation.
        eos_ids: tokens that end a row; they are not part of the result.
        pad_id: filler for ended rows.
        sampling: how tokens are chosen; greedy by default.
        select_rows: told the indices (into the rows computed before) that are still computed from now on; ``None``
            computes all rows to the end.
        prompts: the rows are so many prompts, the same ones for each member in turn; what these have in common at
            their beginning is then computed once per member. ``None`` computes every row by itself.
        defaults: what is applied of the model's generation config, which is not looked at here; nothing by default.
        memory: the rows go on where they stopped in an earlier call, and what is computed of them is kept in it.

    Returns:
        One list of token ids per row, without the prompt.
    """
    sampling, defaults = sampling or Sampling(), defaults or GenerationDefaults()
    if not _decodes_with_cache(model):
        return _generate_by_model(model, input_ids, attention_mask, max_tokens, eos_ids, pad_id, sampling, defaults)
    with decoding_attention(model):
        return _decode(
            model, input_ids, attention_mask, max_tokens, eos_ids, pad_id, sampling, defaults,
            select_rows, prompts, memory,
        )  # fmt: skip


def _decode(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    max_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    sampling: Sampling,
    defaults: GenerationDefaults,
    select_rows: Callable[[Tensor], None] | None,
    prompts: int | None,
    memory: Memory | None,
) -> list[list[int]]:
    """The arguments of :func:`generate`, for a decoder whose cache can be cut by rows."""
    rows, device = input_ids.shape[0], input_ids.device
    made = torch.full((rows, max_tokens), pad_id, dtype=torch.long, device=device)
    lengths = torch.full((rows,), max_tokens, dtype=torch.long, device=device)
    ends = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
    process = Processing(defaults, input_ids, attention_mask, max_tokens=max_tokens, ends=eos_ids)
    alive = torch.arange(rows, device=device)
    open_rows = torch.ones(rows, dtype=torch.bool, device=device)
    mask, tokens = attention_mask, input_ids
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    parameters = inspect.signature(model.forward).parameters
    # An index, not the number 1: it gathers the last hidden states side by side, where a slice would leave them
    # strided, and a product of strided rows copies the output head once per row in bfloat16 (a gigabyte for 20 rows).
    extra: dict[str, Any] = {}
    if "logits_to_keep" in parameters:
        extra["logits_to_keep"] = torch.tensor([-1], device=device)

    def forward(**given: Any) -> Any:
        if "position_ids" not in parameters:
            given.pop("position_ids")
        return model(use_cache=True, **given, **extra)

    def written(rows: Tensor, step: int) -> list[Tensor]:
        """What the cache has of the rows' own tokens after the forward of a step."""
        return [made[row, : min(int(lengths[row]), step)] for row in rows.tolist()]

    cache: Any = None
    known = 0
    if memory is not None:
        cache, known = memory.recall(input_ids, attention_mask)
        tokens, positions = tokens[:, known:], positions[:, known:]
    shared = common_prefix(tokens[:prompts], mask[:prompts]) if prompts and not known else 0
    if shared and prompts and getattr(model, "cache_has_rows", False):
        cache, mask = _shared_state(forward, tokens, mask, positions, prompts, shared)
        tokens, positions = tokens[:, shared:], positions[:, shared:]
    elif shared and prompts and (empty := plain_cache(model)) is not None:
        cache = _shared_cache(forward, empty, tokens, mask, prompts, shared)
        tokens, positions = tokens[:, shared:], positions[:, shared:]
    if cache is None and not getattr(model, "cache_has_rows", False):
        cache = plain_cache(model)
    for step in range(max_tokens):
        out = forward(input_ids=tokens, attention_mask=mask, past_key_values=cache, position_ids=positions)
        cache = out.past_key_values
        scores = out.logits[:, -1].float()
        if defaults.applied:
            scores = process(made[alive, :step], scores, alive)
        chosen = sampling.choose(scores, step, alive)
        ended = torch.isin(chosen, ends) & open_rows
        lengths[alive[ended]] = step
        made[alive[open_rows], step] = chosen[open_rows]
        open_rows = open_rows & ~ended
        remaining = int(open_rows.sum())
        if remaining == 0 or step + 1 == max_tokens:
            break
        if select_rows is not None and len(alive) - remaining >= COMPACT_FRACTION * len(alive):
            keep = open_rows.nonzero().squeeze(1)
            if memory is not None:
                cut = (~open_rows).nonzero().squeeze(1)
                memory.keep(cache, cut, alive[cut], input_ids, attention_mask, written(alive[cut], step))
            cache.batch_select_indices(keep)
            select_rows(keep)
            alive, chosen, mask, positions = alive[keep], chosen[keep], mask[keep], positions[keep]
            open_rows = open_rows[keep]
        tokens = chosen.unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1)
        positions = positions[:, -1:] + 1
    if memory is not None:
        memory.keep(cache, None, alive, input_ids, attention_mask, written(alive, step))
    return [row[:length] for row, length in zip(made.tolist(), lengths.tolist(), strict=True)]


def _shared_cache(
    forward: Callable[..., Any], empty: Any, tokens: Tensor, mask: Tensor, prompts: int, shared: int
) -> Any:
    """The cache of the first ``shared`` columns of all rows."""
    begin = int(mask.shape[1] - mask[0].sum())
    prefix = tokens[::prompts, begin : begin + shared]
    places = torch.arange(shared, device=tokens.device).expand(len(prefix), -1)
    ones = torch.ones_like(prefix)
    cache = forward(input_ids=prefix, attention_mask=ones, past_key_values=empty, position_ids=places).past_key_values
    padding = (mask.shape[1] - mask.sum(-1)).to(torch.long)
    return spread(cache, torch.arange(len(tokens), device=tokens.device) // prompts, padding)


def _shared_state(
    forward: Callable[..., Any], tokens: Tensor, mask: Tensor, positions: Tensor, prompts: int, shared: int
) -> tuple[Any, Tensor]:
    """The state after the first ``shared`` tokens of all rows, and the mask of what is left to read.

    A state has no columns that could begin later, so that what stands before a row's own tokens is masked.
    """
    begin = int(mask.shape[1] - mask[0].sum())
    prefix = tokens[::prompts, begin : begin + shared]
    ones = torch.ones_like(prefix)
    places = torch.arange(shared, device=tokens.device).expand(len(prefix), -1)
    state = forward(input_ids=prefix, attention_mask=ones, past_key_values=None, position_ids=places).past_key_values
    state.batch_select_indices(torch.arange(len(tokens), device=tokens.device) // prompts)
    return state, mask * (positions >= shared)


def _decodes_with_cache(model: Any) -> bool:
    """Whether a model is a decoder whose cache can be cut by rows: attention, or a state that says that it can."""
    if getattr(model, "cache_has_rows", False):
        return True
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        return False
    accepts = inspect.signature(model.forward).parameters
    kinds = getattr(config, "layer_types", None) or []
    recurrent = getattr(model, "_is_stateful", False) or any(_keeps_state(kind) for kind in kinds)
    return "past_key_values" in accepts and not recurrent


def _keeps_state(kind: str) -> bool:
    """Whether a kind of layer, as configurations name them, has a state in the place of keys and values."""
    return "attention" not in kind or "linear" in kind


def _generate_by_model(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    max_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    sampling: Sampling,
    defaults: GenerationDefaults,
) -> list[list[int]]:
    from transformers import LogitsProcessorList

    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    chooser = _Chooser(sampling, defaults, input_ids, attention_mask, max_tokens, eos_ids, encoder_decoder)
    own = model.generation_config
    # The model's own one is put away: transformers would fill up from it whatever is not set here.
    model.generation_config = GenerationDefaults.plain(
        own,
        max_new_tokens=max_tokens,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        eos_token_id=list(eos_ids) or None,
        pad_token_id=pad_id,
    )
    try:
        out = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            generation_config=model.generation_config,
            logits_processor=LogitsProcessorList([chooser]),
        )
    finally:
        model.generation_config = own
    start = 1 if encoder_decoder else input_ids.shape[1]
    ends = set(eos_ids)
    results = []
    for row in out[:, start:].tolist():
        stop = next((index for index, token in enumerate(row) if token in ends), len(row))
        results.append(row[:stop])
    return results


class _Chooser:
    """A logits processor that applies the model's defaults and, when sampling, leaves only the sampled token."""

    def __init__(
        self,
        sampling: Sampling,
        defaults: GenerationDefaults,
        ids: Tensor,
        mask: Tensor,
        max_tokens: int,
        ends: Sequence[int],
        encoder_decoder: bool,
    ) -> None:
        self.sampling, self.defaults, self.step = sampling, defaults, 0
        self.ids, self.mask, self.encoder_decoder = ids, mask, encoder_decoder
        self.limits: dict[str, Any] = {"max_tokens": max_tokens, "ends": ends}
        self.process: Processing | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = torch.arange(scores.shape[0], device=scores.device)
        if self.process is None:
            begin, mask, read = self.ids, self.mask, None
            if self.encoder_decoder:  # the decoder begins with a start token of its own
                begin, mask, read = input_ids, torch.ones_like(input_ids), (self.ids, self.mask)
            self.process = Processing(self.defaults, begin, mask, encoder=read, **self.limits)
        if self.defaults.applied:
            scores = self.process(input_ids[:, self.process.prompt.shape[1] :], scores, rows)
        if self.sampling.keys is None:
            return scores
        chosen = self.sampling.choose(scores, self.step, rows)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, chosen.unsqueeze(1), 0.0)
