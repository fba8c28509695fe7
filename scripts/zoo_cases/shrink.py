"""Configurations of transformers made tiny: sizes by the names of their fields, lists by layer, parts by themselves."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any

VOCABULARY = 97
LAYERS = 2

# The first pattern that matches a field's whole name gives its size. Integers only.
SIZES: list[tuple[str, int]] = [
    (r"\w*codebook_size", 64),
    (r"(\w+_)?vocab_size|n_vocab|vocab_size_per_layer_input|num_codevectors_per_group", VOCABULARY),
    (r"mamba_n_heads|mamba_num_heads|mamba_d_head|mamba_head_dim", 8),
    (r"type_vocab_size|num_channels|in_chans|in_channels|out_channels|\w*audio_channels|channels", -1),
    (r"\w*(num_key_value_heads|num_kv_heads|kv_n_heads|num_global_key_value_heads|multi_query_group_num)", 2),
    (r"\w*(num_attention_heads|attention_heads|num_heads|n_heads|n_head|num_mem_heads|attention_num_heads)", 4),
    (r"linear_num_value_heads|linear_num_key_heads|linear_num_heads|index_n_heads|num_attn_heads", 4),
    (r"mamba_d_state|state_size|mamba_d_ssm|ssm_state_size", 64),
    (r"mamba_n_groups|n_groups|mamba_ngroups", 1),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"\w*(chunk_size|block_size)", 8),
    (r"qk_rope_head_dim|rotary_dim|index_topk|attention_chunk_size|\w*window_size|sliding_window", 4),
    (r"qk_nope_head_dim|v_head_dim|index_head_dim|kv_channels|\w*head_dim|d_kv|\w*head_size|d_qkv", 8),
    (r"qk_head_dim", 12),
    (r"\w*lora_rank|\w*lora_r|gate_low_rank_dim|\w*lora_rank_\w+", 8),
    (r"\w*(experts_per_tok|experts_per_token|moe_topk|top_k|moe_k)|num_selected_experts|expert_capacity", 2),
    (r"n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"\w*(num_experts|num_local_experts|n_routed_experts|moe_num_experts)", 4),
    (r"first_k_dense_replace|num_dense_layers|num_nextn_predict_layers|num_kv_shared_layers", 1),
    (r"moe_intermediate_size|shared_expert_intermediate_size|expert_dim|shared_intermediate_size", 24),
    (r"\w*(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|d_inner|n_inner|mlp_dim|intermediate_dim|ffn_size)", 48),
    (r"hidden_dim_ffn|\w*feed_forward_size|feedforward_size|\w*feedforward_dim|ffn_embed_dim|expert_ffn_size", 48),
    (r"\w*(num_hidden_layers|num_layers|encoder_layers|decoder_layers|n_layers?|num_hidden_groups|num_blocks)", LAYERS),
    (r"depth|num_encoder_layers|num_decoder_layers|n_encoder_layers", LAYERS),
    (r"\w*(hidden_size|d_model|n_embd|embed_dim|emb_dim|hidden_dim|dim|model_dim|embedding_dim|d_embed)", 32),
    (r"embedding_size|word_embed_proj_dim|projection_dim|\w*projection_size|output_dim|out_hidden_size|lru_width", 32),
    (r"\w*(pooler_output_size|decoder_width|rotary_ndims|width|proj_dim|hidden_channels|latent_dim)", 32),
    (r"\w*(max_position_embeddings|n_positions|max_positions|max_\w+_positions|max_seq_len)", 128),
    (r"max_sequence_length|seq_length|max_length|n_ctx|context_length|max_seq_length", 128),
    (r"image_size|input_size|img_size|pretrain_image_size", 32),
    (r"patch_size|encoder_stride", 8),
    (r"num_mel_bins|num_mels|feature_size|input_feat_per_channel", 16),
    (r"num_queries|num_query_tokens|num_latents", 5),
    (r"num_labels", 3),
    (r"num_groups", 8),
    (r"num_conv_pos_embeddings", 8),
    (r"num_conv_pos_embedding_groups", 2),
    (r"classifier_proj_size|xvector_output_dim|proj_codevector_dim|codevector_dim", 16),
    (r"relative_attention_num_buckets|position_buckets|\w*num_buckets", 8),
]
# Fields that are derived from full sizes where they are None.
NONE = {"head_dim": 8, "vocab_size": VOCABULARY}
TOKEN = re.compile(r"\w*(token_id|token_index|token_ids)")
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 2}


def size_of(name: str, value: int) -> int | None:
    """The size of an integer field, or ``None`` to leave it. Fields never grow."""
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            return None if size < 0 or value <= 0 else min(size, value)
    return None


def kept_layers(fields: Mapping[str, Any], layers: int) -> list[int]:
    """Layers that are kept, so that each kind that the per-layer lists name is among them."""
    lists = [v for v in fields.values() if isinstance(v, list | tuple) and len(v) == layers and _is_kinds(v)]
    kinds = list(zip(*lists, strict=True)) if lists else [()] * layers
    chosen = sorted({kinds.index(kind) for kind in kinds})[:4]
    rest = [layer for layer in range(layers) if layer not in chosen]
    return sorted([*chosen, *rest[: max(0, LAYERS - len(chosen))]])


def _is_kinds(value: Any) -> bool:
    return all(isinstance(entry, str) for entry in value)


def small_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a tiny configuration that differ from those of a full one."""
    layers = next((fields[k] for k in ("num_hidden_layers", "n_layer", "num_layers") if _is_int(fields.get(k))), 0)
    kept = kept_layers(fields, layers) if layers else []
    changed: dict[str, Any] = {}
    other_token = 90
    for name, value in fields.items():
        if TOKEN.fullmatch(name):
            if _is_int(value) and value >= 3:
                other_token = other_token - 1 if name not in SPECIAL else other_token
                changed[name] = SPECIAL.get(name, other_token)
            elif isinstance(value, list) and value:
                changed[name] = [SPECIAL.get(name, 2)]
        elif _is_int(value):
            size = size_of(name, value)
            if size is not None:
                changed[name] = size
            changed.update(_as_its_twin(fields, name))
        elif value is None and name in NONE:
            changed[name] = NONE[name]
        elif isinstance(value, list | tuple) and layers > 1 and len(value) == layers and kept:
            changed[name] = type(value)(value[layer] for layer in kept)
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if kept and _is_int(fields.get(name)):
            changed[name] = len(kept)
    changed.update(_stages(fields))
    changed.update(_rotations(fields))
    return changed


def _rotations(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary embeddings of time, height and width share a head's dimensions: heads are 16 wide there."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling")
    if not isinstance(rope, Mapping) or not rope.get("mrope_section"):
        return {}
    half = int(8 * rope.get("partial_rotary_factor", 1.0))
    section = [half - 2 * (half // 4), half // 4, half // 4]
    wide = {"head_dim": 16} if "head_dim" in fields else {"num_attention_heads": 2, "num_key_value_heads": 2}
    return {"rope_parameters": {**rope, "mrope_section": section}, **wide}


# Fields that have the size of another one where the full configuration has it so.
TWINS = {
    "num_key_value_heads": "num_attention_heads",
    "head_dim": "qk_rope_head_dim",
    "linear_num_value_heads": "linear_num_key_heads",
}


def _as_its_twin(fields: Mapping[str, Any], name: str) -> dict[str, int]:
    twin = TWINS.get(name)
    if twin is None or fields.get(twin) != fields[name] or not _is_int(fields[twin]):
        return {}
    size = size_of(twin, fields[twin])
    return {} if size is None else {name: size}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _stages(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Lists by stage of hierarchical vision models: one block a stage, narrow stages."""
    changed: dict[str, Any] = {}
    for name, value in fields.items():
        if not isinstance(value, list | tuple) or not value or not all(_is_int(x) for x in value):
            continue
        count = len(value)
        if name in ("depths", "num_blocks", "layer_depths", "depth", "layers", "decoder_depths"):
            changed[name] = [1] * count
        elif name in ("hidden_sizes", "embed_dims", "widths", "embed_dim", "neck_hidden_sizes", "channels"):
            changed[name] = [16 * (stage + 1) for stage in range(count)]
        elif name in ("num_heads", "num_attention_heads", "encoder_attention_heads"):
            changed[name] = [1, 2, 2, 4, 4, 4][:count]
        elif name in ("conv_dim", "tdnn_dim"):
            changed[name] = [8] * count
    return changed


def shrunk(config_class: Any, overrides: Mapping[str, Any] | None = None) -> Any:
    """A tiny configuration of a class: its own fields, and those of its parts."""
    full = config_class()
    overrides = dict(overrides or {})
    parts: dict[str, Any] = {}
    for name in getattr(config_class, "sub_configs", {}):
        part = getattr(full, name, None)
        if part is not None and hasattr(part, "to_dict"):
            inner = overrides.pop(name, None)
            if hasattr(inner, "to_dict"):
                parts[name] = inner
                continue
            with contextlib.suppress(Exception):
                parts[name] = shrunk(type(part), inner)
    fields = {k: v for k, v in full.to_dict().items() if k not in parts and not k.startswith("_")}
    changed = {k: v for k, v in small_fields(fields).items() if k not in ("max_length",)}
    return config_class(**{**changed, **parts, **overrides})
