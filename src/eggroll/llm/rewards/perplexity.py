"""The likelihood of given texts, for the whole population in one forward pass."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eggroll.errors import ConfigError, DataError, RewardError
from eggroll.llm.data.examples import Example
from eggroll.llm.generation.chat import Prompt, format_prompts, template_arguments
from eggroll.llm.generation.encode import encode_prompts
from eggroll.llm.rewards.base import Need, Reward
from eggroll.llm.rewards.logits import chunked_logits

IGNORED = -100
"""Label of a token that is not scored, as everywhere in transformers."""

LOGITS_BUDGET = 256 * 2**20
"""Bytes of logits that exist at once."""


class PerplexityReward(Reward):
    """Mean log-likelihood per token, in nats: the reward is ``-loss``, and perplexity is ``exp(-reward)``.

    Of plain texts every token is scored; of a prompt with a ``completion`` column, or of a conversation whose last
    turn is the assistant's, only the answer.

    Args:
        tokenizer: a Hugging Face tokenizer.
        max_length: tokens per row; longer texts lose their end, longer prompts before an answer their beginning.
        logits_budget: bytes of logits that may exist at once; the loss runs over time in pieces of this size.
    """

    needs: Need = "tokens"
    name = "perplexity"

    def __init__(self, tokenizer: Any, max_length: int = 512, *, logits_budget: int = LOGITS_BUDGET) -> None:
        if max_length < 2:
            raise ConfigError(f"max_length (={max_length}) must be at least 2: the first token only starts the text")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.logits_budget = logits_budget

    def encode(
        self, examples: Sequence[Example | str], *, device: Any = "cpu", encoder_decoder: bool = False
    ) -> dict[str, Tensor]:
        """Token ids of examples, padded on the right.

        Returns:
            ``input_ids``, ``attention_mask`` and ``labels``, each ``(len(examples), time)`` int64; for an
            encoder-decoder the labels are the completion and have a length of their own.

        Raises:
            DataError: an example has no text (or, for an encoder-decoder, no completion).
        """
        prompts: list[list[int]] = []
        answers: list[list[int]] = []
        for number, example in enumerate(examples, start=1):
            example = Example(None, example) if isinstance(example, str) else example
            prompt, answer = self._tokens(example, number, encoder_decoder)
            if encoder_decoder and prompt is None:
                raise DataError(
                    f"example {number} has no completion: an encoder-decoder model reads a prompt and is scored on a "
                    "completion. Give the columns 'prompt' and 'completion'"
                )
            prompts.append(prompt or [])
            answers.append(answer)
        if encoder_decoder:
            inputs = self._padded([ids[-self.max_length :] for ids in prompts], device)
            targets = self._padded([ids[: self.max_length] for ids in answers], device)
            labels = targets["input_ids"].masked_fill(targets["attention_mask"] == 0, IGNORED)
            return {**inputs, "labels": labels}
        rows, starts = [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            answer = answer[: self.max_length]
            kept = prompt[max(0, len(prompt) + len(answer) - self.max_length) :]
            rows.append(kept + answer)
            starts.append(len(kept))
        batch = self._padded(rows, device)
        position = torch.arange(batch["input_ids"].shape[1], device=device)
        unscored = (batch["attention_mask"] == 0) | (position < torch.tensor(starts, device=device)[:, None])
        return {**batch, "labels": batch["input_ids"].masked_fill(unscored, IGNORED)}

    def log_likelihood(
        self,
        model: nn.Module,
        input_ids: Any,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Mean log-likelihood per scored token of each row: ``(rows,)`` float32, higher is better.

        Args:
            model: a causal or encoder-decoder model; its parameters may stand for a population, with rows member by
                member.
            input_ids: ``(rows, time)``; or a mapping with all inputs, as a ``DataLoader`` yields.
            attention_mask: ``(rows, time)``, 0 for padding.
            labels: ``(rows, time)`` token ids to score, not shifted, -100 for tokens that are not scored. Without
                them a causal model is scored on its inputs.
            **inputs: further arguments of the model.

        A row without any scored token gets 0 for every member.
        """
        if isinstance(input_ids, Mapping):
            given = {**input_ids, **inputs}
            input_ids = given.pop("input_ids")
            attention_mask = given.pop("attention_mask", attention_mask)
            labels = given.pop("labels", labels)
            inputs = given
        device = getattr(model, "device", None)
        ids = torch.as_tensor(input_ids, device=device)
        mask = None if attention_mask is None else torch.as_tensor(attention_mask, device=device)
        labels = None if labels is None else torch.as_tensor(labels, device=device)
        arguments = {"input_ids": ids, "attention_mask": mask, **inputs}
        config: Any = model.config
        if getattr(config, "is_encoder_decoder", False):
            targets = self._encoder_decoder(model, arguments, labels)
        else:
            targets = _next_tokens(ids, mask, labels)
        total: Tensor | None = None
        for start, logits in chunked_logits(model, arguments, self.logits_budget):
            wanted = targets[:, start : start + logits.shape[1]]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none")
            piece = losses.view(wanted.shape).sum(1)
            total = piece if total is None else total + piece
        assert total is not None, "a model gives logits for at least one step"
        count = (targets != IGNORED).sum(1).clamp(min=1)
        return (-total / count).float()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, inputs: Any) -> float:
        """The mean over the rows of one batch, for a single model."""
        return float(self.log_likelihood(model, inputs).mean())

    def _encoder_decoder(self, model: Any, arguments: dict[str, Any], labels: Tensor | None) -> Tensor:
        """Puts the decoder's inputs among the arguments; the decoder's step t predicts label t."""
        if labels is None:
            raise RewardError(
                f"{type(model).__name__} reads an input and writes an answer, so perplexity needs the answer: give "
                "labels, or a data set with the columns 'prompt' and 'completion'"
            )
        if "decoder_input_ids" not in arguments:
            arguments["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)
        return labels

    def _tokens(self, example: Example, number: int, encoder: bool) -> tuple[list[int] | None, list[int]]:
        """Token ids of the part that is read and of the part that is scored; ``None`` if everything is scored."""

        def read(prompt: Prompt) -> list[int]:
            columns = [example.columns]
            return encode_prompts(
                self.tokenizer, [prompt], sys.maxsize, chat=False, columns=columns, encoder=encoder
            ).input_ids[0]

        completion = example.columns.get("completion")
        if isinstance(example.prompt, str) and isinstance(completion, str):
            answer = self.tokenizer(completion, add_special_tokens=False).input_ids
            end = self.tokenizer.eos_token_id
            return read(example.prompt), [*answer, *([] if end is None else [end])]
        whole = example.columns.get("messages")
        if isinstance(example.prompt, list) and isinstance(completion, list):
            whole = [*example.prompt, *completion]
        if isinstance(example.prompt, list) and whole and len(whole) > len(example.prompt):
            opening = format_prompts(self.tokenizer, [example.prompt], columns=[example.columns])[0]
            arguments = template_arguments(self.tokenizer, example.columns)
            text = str(self.tokenizer.apply_chat_template(whole, tokenize=False, **arguments))
            at = text.find(opening)
            if at >= 0:
                answer = self.tokenizer(text[at + len(opening) :], add_special_tokens=False).input_ids
                return read(example.prompt), list(answer)
        scored = example.text if example.text is not None else example.prompt
        if not isinstance(scored, str):
            raise DataError(
                f"example {number} has no text to score: its columns are {sorted(example.columns)}. Perplexity needs "
                "a column 'text', a 'prompt' with a 'completion', or 'messages' that end with the assistant's turn"
            )
        return None, list(self.tokenizer(scored, truncation=True, max_length=self.max_length).input_ids)

    def _padded(self, rows: list[list[int]], device: Any) -> dict[str, Tensor]:
        pad = self.tokenizer.pad_token_id
        length = max((len(row) for row in rows), default=0)
        ids = torch.full((len(rows), length), 0 if pad is None else pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[index, : len(row)] = 1
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _next_tokens(ids: Tensor, mask: Tensor | None, labels: Tensor | None) -> Tensor:
    """What each step has to predict: the next label, or -100 where that is padding or follows padding."""
    targets = ids if labels is None else labels
    targets = F.pad(targets[:, 1:], (0, 1), value=IGNORED)
    if mask is None:
        return targets
    real = mask.bool()
    # under left padding the first token would be predicted from padding, which says nothing about the model
    return targets.masked_fill(~(real & F.pad(real[:, 1:], (0, 1), value=False)), IGNORED)
