"""The configuration of an RWKV-7 model, with the names that its Hugging Face checkpoints use."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class RWKV7Config(PretrainedConfig):
    """Sizes of an RWKV-7 model (arXiv 2503.14456).

    Names and defaults are those of the checkpoints of ``flash-linear-attention`` and ``rwkv7-hf``; what else they
    state (kernels, fused operations) is kept and not used.

    Args:
        vocab_size: rows of the embedding and of the head.
        hidden_size: width of the residual stream, ``heads * head_dim``.
        num_hidden_layers: blocks.
        head_dim: entries of a head; its state is ``(head_dim, head_dim)``.
        intermediate_size: width inside the channel mix, 4 times the hidden size by default.
        decay_low_rank_dim, a_low_rank_dim, v_low_rank_dim, gate_low_rank_dim: inner sizes of the low-rank pairs
            w, a, v and g.
        norm_eps: of the layer norms.
        head_norm_eps: of the norm over heads; ``head_dim * norm_eps`` by default. Original files have 64e-5 always.
    """

    model_type = "rwkv7"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 65536,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        head_dim: int = 64,
        intermediate_size: int | None = None,
        hidden_ratio: float | None = 4.0,
        decay_low_rank_dim: int = 64,
        a_low_rank_dim: int = 64,
        v_low_rank_dim: int = 32,
        gate_low_rank_dim: int = 128,
        norm_eps: float = 1e-5,
        head_norm_eps: float | None = None,
        use_cache: bool = True,
        pad_token_id: int | None = 0,
        bos_token_id: int | None = None,
        eos_token_id: int | None = 0,
        tie_word_embeddings: bool = False,
        **others: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.head_dim = head_dim or 64
        self.hidden_ratio = hidden_ratio or 4.0
        self.intermediate_size = intermediate_size or int(hidden_size * self.hidden_ratio)
        self.decay_low_rank_dim = decay_low_rank_dim
        self.a_low_rank_dim = a_low_rank_dim
        self.v_low_rank_dim = v_low_rank_dim
        self.gate_low_rank_dim = gate_low_rank_dim
        self.norm_eps = norm_eps
        self.head_norm_eps = head_norm_eps or self.head_dim * norm_eps
        self.use_cache = use_cache
        others.setdefault("architectures", ["RWKV7ForCausalLM"])
        others["num_heads"] = hidden_size // self.head_dim
        super().__init__(
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **others,
        )
