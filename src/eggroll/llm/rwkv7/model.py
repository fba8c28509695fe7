"""RWKV-7 as a Hugging Face model, written from the published equations (arXiv 2503.14456, sections 4 and appendix).

Parameters have the names of the original checkpoints (``blocks.0.att.receptance.weight``). Everything that is no
matrix is kept as a vector: mixes ``x_*``, the biases ``w0``, ``a0``, ``v0``, the scales ``k_k``, ``k_a``, ``r_k``, and
norms. So a population perturbs the projections and the low-rank pairs by default, and vectors on request.

Rows are independent of each other: a population is its members' rows in one batch, with the recurrent state
``(members * batch, heads, N, N)`` in the place of a KV cache.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from eggroll.core.rwkv7 import to_layout
from eggroll.llm.rwkv7.cache import LayerState, RWKV7Cache
from eggroll.llm.rwkv7.config import RWKV7Config
from eggroll.llm.rwkv7.weights import PTH_FILE, fill, read_directory, save_pth
from eggroll.llm.rwkv7.wkv import wkv7

LOG_DECAY = -math.exp(-0.5)
"""A token's decay is ``exp(LOG_DECAY * sigmoid(...))``, between 0.545 and 1."""


class Shift:
    """Where each token's predecessor is, for rows padded on the left: padding is stepped over.

    Args:
        mask: ``(R, T)``, false for padding, or ``None`` for no padding.
    """

    def __init__(self, mask: Tensor | None) -> None:
        self.mask = mask
        if mask is not None:
            places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
            last = torch.where(mask, places, 0).cummax(dim=1).values  # 0: the state's token
            self.before = F.pad(last[:, :-1], (1, 0)).unsqueeze(-1)
            self.end = last[:, -1:].unsqueeze(-1)

    def __call__(self, x: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens before ``x (R, T, C)``, of which the first is ``previous (R, C)``, and the last token."""
        if self.mask is None:
            if x.shape[1] == 1:
                return previous.unsqueeze(1), x[:, 0]
            return torch.cat([previous.unsqueeze(1), x[:, :-1]], dim=1), x[:, -1]
        together, width = torch.cat([previous.unsqueeze(1), x], dim=1), x.shape[-1]
        shifted = together.gather(1, self.before.expand(-1, -1, width))
        return shifted, together.gather(1, self.end.expand(-1, -1, width)).squeeze(1)


class TimeMix(nn.Module):
    """The recurrent half of a block."""

    x_r: Tensor
    x_w: Tensor
    x_k: Tensor
    x_v: Tensor
    x_a: Tensor
    x_g: Tensor
    k_k: Tensor
    k_a: Tensor
    r_k: Tensor
    w0: Tensor
    w1: Tensor
    w2: Tensor
    a0: Tensor
    a1: Tensor
    a2: Tensor
    v0: Tensor
    v1: Tensor
    v2: Tensor
    g1: Tensor
    g2: Tensor
    receptance: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.layer, self.size = layer, config.head_dim
        self.eps = config.head_norm_eps
        for name in ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "k_k", "k_a", "r_k"):
            setattr(self, name, nn.Parameter(torch.zeros(width)))
        pairs = {"w": config.decay_low_rank_dim, "a": config.a_low_rank_dim, "g": config.gate_low_rank_dim}
        if layer:
            pairs["v"] = config.v_low_rank_dim
        for name, inner in pairs.items():
            if name != "g":
                setattr(self, f"{name}0", nn.Parameter(torch.zeros(width)))
            setattr(self, f"{name}1", nn.Parameter(torch.zeros(width, inner)))
            setattr(self, f"{name}2", nn.Parameter(torch.zeros(inner, width)))
        for name in ("receptance", "key", "value", "output"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.ln_x = Affine(width)

    def forward(
        self, x: Tensor, state: LayerState, shift: Shift, v_first: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(R, T, C)`` to the output, the new WKV state, the last token, and the first block's values."""
        shifted, last = shift(x, state.att_shift)
        delta = shifted - x
        r = self.receptance(x + delta * self.x_r)
        w = self.w0 + torch.tanh((x + delta * self.x_w) @ self.w1) @ self.w2
        k = self.key(x + delta * self.x_k)
        x_v = x + delta * self.x_v
        v = self.value(x_v)
        a = torch.sigmoid(self.a0 + ((x + delta * self.x_a) @ self.a1) @ self.a2)
        g = torch.sigmoid((x + delta * self.x_g) @ self.g1) @ self.g2
        kk = F.normalize(self._heads(k * self.k_k), dim=-1)
        k = k * (1 + (a - 1) * self.k_a)
        if v_first is None:
            v_first = v
        else:
            v = v + (v_first - v) * torch.sigmoid(self.v0 + (x_v @ self.v1) @ self.v2)
        log_w = LOG_DECAY * torch.sigmoid(self._heads(w).float())
        heads_r, heads_k, heads_v = self._heads(r), self._heads(k), self._heads(v)
        to, fro, values = -kk, kk * self._heads(a), heads_v
        if shift.mask is not None:  # padding leaves the state as it is
            keep = shift.mask[:, :, None, None]
            log_w, to, values = (torch.where(keep, part, 0.0) for part in (log_w, to, heads_v))
        y, wkv = wkv7(
            heads_r.float(), log_w, heads_k.float(), values.float(), to.float(), fro.float(), state.wkv
        )  # fmt: skip
        y = F.layer_norm(y.to(x.dtype), (self.size,), eps=self.eps)  # a group norm with a group for each head
        bonus = self._heads(r * k * self.r_k).sum(-1, keepdim=True) * heads_v
        y = self.ln_x(y.flatten(2)) + bonus.flatten(2)
        return self.output(y * g), wkv, last, v_first

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.size))


class Affine(nn.Module):
    """The weight and bias of the norm over heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Scaled and shifted."""
        return x * self.weight + self.bias


class ChannelMix(nn.Module):
    """The half of a block that looks one token back."""

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__()
        self.x_k = nn.Parameter(torch.zeros(config.hidden_size))
        self.key = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.value = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, state: LayerState, shift: Shift) -> tuple[Tensor, Tensor]:
        """``(R, T, C)`` to the output and the last token."""
        shifted, last = shift(x, state.ffn_shift)
        return self.value(torch.relu(self.key(x + (shifted - x) * self.x_k)) ** 2), last


class Block(nn.Module):
    """Time mix and channel mix, each behind a layer norm; the first block also norms the embedding."""

    ln0: nn.LayerNorm
    ln1: nn.LayerNorm
    ln2: nn.LayerNorm

    def __init__(self, config: RWKV7Config, layer: int) -> None:
        super().__init__()
        names = ("ln0", "ln1", "ln2") if layer == 0 else ("ln1", "ln2")
        for name in names:
            setattr(self, name, nn.LayerNorm(config.hidden_size, eps=config.norm_eps))
        self.att = TimeMix(config, layer)
        self.ffn = ChannelMix(config)

    def forward(
        self, x: Tensor, state: LayerState, shift: Shift, v_first: Tensor | None
    ) -> tuple[Tensor, LayerState, Tensor]:
        """``(R, T, C)`` to the same, the new state, and the first block's values."""
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        mixed, wkv, att_shift, v_first = self.att(self.ln1(x), state, shift, v_first)
        x = x + mixed
        mixed, ffn_shift = self.ffn(self.ln2(x), state, shift)
        return x + mixed, LayerState(wkv, att_shift, ffn_shift), v_first


class RWKV7ForCausalLM(PreTrainedModel, GenerationMixin):
    """RWKV-7 with its head. Reading a text at once or token by token gives the same."""

    config_class = RWKV7Config
    base_model_prefix = ""
    _is_stateful = True
    cache_has_rows = True
    """The cache can be cut by rows, so that generation drops rows that have ended."""
    _no_split_modules = ("Block",)

    def __init__(self, config: RWKV7Config) -> None:
        super().__init__(config)
        self.emb = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.ln_out = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.unused: dict[str, Tensor] = {}  # of an original file, written back as it was
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        width = self.config.hidden_size
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=0.5 / math.sqrt(module.in_features))
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.LayerNorm | Affine):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, TimeMix):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 2:
                    init.normal_(parameter, std=0.1 / math.sqrt(parameter.shape[0]))
                elif name.startswith("x_"):
                    init.constant_(parameter, 0.5)
                elif name in ("k_k", "k_a"):
                    init.ones_(parameter)
                elif name == "w0":
                    init.copy_(parameter, torch.linspace(-6, -1, width))
        elif isinstance(module, ChannelMix):
            init.constant_(module.x_k, 0.5)

    @property
    def state_size(self) -> int:
        """Float32 entries of a row's WKV state in one block."""
        return self.config.hidden_size * self.config.head_dim

    @property
    def carried_size(self) -> int:
        """Entries of the last token, in the weights' dtype, that a block carries for a row: one for each half."""
        return 2 * self.config.hidden_size

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of tokens."""
        return self.emb

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding in its place."""
        self.emb = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put another head in its place."""
        self.head = new_embeddings  # type: ignore[assignment]

    def empty_cache(self, rows: int, like: Tensor) -> RWKV7Cache:
        """The state before the first token, of ``rows`` rows, on the device and in the dtype of ``like``."""
        width, size = self.config.hidden_size, self.config.head_dim
        layers = [
            LayerState(
                torch.zeros(rows, width // size, size, size, device=like.device),
                like.new_zeros(rows, width),
                like.new_zeros(rows, width),
            )
            for _ in self.blocks
        ]
        return RWKV7Cache(layers)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: RWKV7Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token at every place.

        Args:
            input_ids: ``(R, T)`` tokens.
            attention_mask: ``(R, at least T)``, 0 for padding, of which the last T columns are read; a row's padding
                may stand anywhere but at its end.
            past_key_values: the state after earlier tokens.
            inputs_embeds: ``(R, T, C)`` in the place of tokens.
            labels: ``(R, T)`` tokens; -100 is left out of the loss.
            use_cache: whether the new state is returned.
            logits_to_keep: how many of the last positions get logits, or the indices of positions; 0 means all.
        """
        x = self.emb(input_ids) if inputs_embeds is None else inputs_embeds
        mask = None if attention_mask is None else attention_mask[:, -x.shape[1] :].bool()
        shift = Shift(None if mask is None or bool(mask.all()) else mask)
        cache = past_key_values if past_key_values is not None and past_key_values.layers else None
        cache = cache or self.empty_cache(x.shape[0], x)
        states: list[LayerState] = []
        v_first: Tensor | None = None
        for block, state in zip(self.blocks, cache.layers, strict=True):
            x, new, v_first = block(x, state, shift, v_first)
            states.append(new)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(self.ln_out(x[:, kept]))
        loss = None if labels is None else self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        after = RWKV7Cache(states, cache.seen + x.shape[1]) if use_cache else None
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=after)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, location: Any, *_: Any, dtype: Any = None, **arguments: Any) -> RWKV7ForCausalLM:
        """Load a Hugging Face directory or hub id in any of the layouts in use."""
        config = arguments.get("config") or RWKV7Config.from_pretrained(location)
        with torch.device("meta"):
            model = cls(config)
        fill(model, read_directory(str(location)), dtype if isinstance(dtype, torch.dtype) else torch.float32, location)
        return model.eval()

    def save_pretrained(self, save_directory: Any, **arguments: Any) -> None:
        """Write a Hugging Face directory with ``flash-linear-attention``'s names, and the original ``.pth`` beside."""
        named = to_layout(self.state_dict(), "fla", self.config.head_dim)
        tensors = {name: tensor.contiguous() for name, tensor in named.items()}
        super().save_pretrained(save_directory, state_dict=tensors, **arguments)
        save_pth(self, Path(save_directory, PTH_FILE))
