"""Settings of a language-model run: the algorithm's, and what is specific to text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from eggroll.core.check import is_number, whole
from eggroll.core.config import ESConfig, ForwardOptions, OptimizerName, QuantizedUpdate, ResidualStart
from eggroll.core.settings import setting
from eggroll.llm.worlds.options import WorldOptions, world_problems
from eggroll.run.options import DeviceOptions

Quantize = Literal["auto", "none", "int8", "int4", "gguf"]
Attention = Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions(DeviceOptions):
    """How a model is loaded."""

    dtype: Dtype = "auto"
    """Weights' dtype; auto takes the faster of float32 and bfloat16 on this machine."""
    quantize: Quantize = setting("auto", absent="none")
    """auto keeps quantized weights (GGUF, a quantized checkpoint) in their format; none expands a GGUF file; int8 and
    int4 quantize plain weights (transformers' --load-in-8bit and --load-in-4bit are taken, too); gguf takes the GGUF
    file of smollm2-135m."""
    revision: str | None = None
    """Revision of a hub id: a branch, a tag, or a commit, which cannot change."""
    attn_implementation: Attention | None = None
    """How attention is computed, in transformers' words (default: the model's choice, mostly sdpa)."""
    trust_remote_code: bool = setting(False, runs_code=bool, always_ask=True)
    """Run code that comes with the model."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How a model answers."""

    max_tokens: int = 128
    """Longest completion, in tokens."""
    max_length: int = 512
    """Longest prompt or text, in tokens; longer prompts lose their beginning, longer texts their end."""
    temperature: float = 0.0
    """0 is greedy; above it, tokens are sampled by address, the same for any split of the members."""
    chat: bool | None = None
    """Whether string prompts go through the chat template; ``None``: if the tokenizer has one."""
    system: str | None = None
    """A system prompt."""


@dataclass(frozen=True, kw_only=True)
class EggrollConfig(WorldOptions, GenerationOptions, ForwardOptions, ESConfig):
    """How a language model is evolved.

    ``target_modules=None`` evolves all matrices but the embedding and the output head; ``embeddings``, ``head`` and
    ``vectors`` add those.

    Raises:
        ConfigError: one or several settings cannot work; the message lists all of them.
    """

    optimizer: OptimizerName = "adam"
    """How the estimate becomes a step. Adam's step does not depend on the scale of scores or the population's size, so
    the default ``lr`` is a size per entry; it keeps two float32 numbers per evolved entry, ``sgd`` keeps none."""
    quantized_update: QuantizedUpdate = setting("error_feedback")
    residual_decay: float = setting(1.0)
    residual_start: ResidualStart = setting("uniform", absent="zero")
    residual_generations: int = setting(0)
    move_threshold: float = setting(2.5)
    samples_per_prompt: int = 1
    """Completions of each prompt that a member is scored on; more than one needs a temperature above 0."""
    pass_at: int = 0
    """0 scores a prompt by the mean over its samples; k by the expected best of k of them (pass@k)."""
    prompts_per_generation: int = setting(8, flags=("--batch-size",))
    """Prompts (or texts) that every member is scored on in a generation."""
    embeddings: bool = False
    """Evolve the token embedding too (with a tied head, both)."""
    head: bool = False
    """Evolve an output head of its own too."""
    vectors: bool = False
    """Evolve norm scales and biases too."""
    eval_every: int = setting(10, resume=True)
    """Generations between evaluations of the center on held-out data."""
    checkpoint_every: int = setting(50, resume=True)
    """Generations between checkpoints. A resumed run rebuilds what came after one from the update log."""
    samples_per_generation: int = setting(2, resume=True)
    """Members' completions per generation that go to ``samples.jsonl``."""

    def problems(self) -> list[str]:
        """Everything that is wrong with these settings, one sentence each."""
        found = super().problems()
        minima = {
            "max_tokens": 1,
            "samples_per_prompt": 1,
            "pass_at": 0,
            "prompts_per_generation": 1,
            "max_length": 2,
            "eval_every": 0,
            "checkpoint_every": 0,
            "samples_per_generation": 0,
        }
        found += whole(self, **minima)
        found += world_problems(self)
        at_once = self.members_per_forward
        if at_once is not None and (not isinstance(at_once, int) or at_once < 1):
            found.append(f"members_per_forward (={at_once}) must be at least 1, or None to choose by memory")
        if not (is_number(self.temperature) and self.temperature >= 0.0):
            found.append(f"temperature (={self.temperature!r}) must be 0 (greedy) or above")
        elif not found:
            found += self._sampling_problems()
        return found

    def _sampling_problems(self) -> list[str]:
        found = []
        if self.samples_per_prompt > 1 and self.temperature == 0.0:
            found.append(
                f"samples_per_prompt (={self.samples_per_prompt}) needs a temperature above 0: greedy samples are equal"
            )
        if self.pass_at > self.samples_per_prompt:
            found.append(
                f"pass_at (={self.pass_at}) must be at most samples_per_prompt (={self.samples_per_prompt}), "
                "or 0 for the mean"
            )
        return found

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of parameters that are evolved when ``target_modules`` is ``None``."""
        extra = ("embedding",) if self.embeddings else ()
        return ("matrix", "conv", "experts", *extra, *(("vector", "other") if self.vectors else ()))
