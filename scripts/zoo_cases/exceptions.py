"""What the general rules do not find for an architecture of transformers, by model type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _ids(seed: int, *shape: int) -> Tensor:
    return torch.randint(3, 80, shape, generator=torch.Generator().manual_seed(seed))


# Left out, with the reason: their inputs are lists of patches with a grid, without a dimension for the batch.
GRID = "its inputs are patches of all images in one row with a grid, which have no batch dimension"
LEFT_OUT: dict[str, str] = dict.fromkeys(
    (
        "cohere_compass_vision",
        "cosmos3_edge_vision",
        "exaone4_5_vision",
        "gemma4_vision",
        "glm4v_moe_vision",
        "glm4v_vision",
        "glm5_next_vision",
        "glm_image_vision",
        "glm_ocr_vision",
        "inkling2_vision",
        "kimi_k25_vision",
        "lfm3_vl_vision",
        "muse_glimmer_vision",
        "muse_spark_vision",
        "qwen2_5_vl_vision",
        "qwen3_5_moe_vision",
        "qwen3_5_vision",
        "qwen3_vl_moe_vision",
        "qwen3_vl_vision",
        "qwen4_exp_vision",
        "minicpm_ocr_vision",
        "minicpmv4_7_vision",
        "video_llama_3_vision",
    ),
    GRID,
)

HEADS: dict[str, str] = {
    "emu3": "Emu3ForConditionalGeneration",
    "llama4": "Llama4ForConditionalGeneration",
    "musicgen": "MusicgenForConditionalGeneration",
    "musicgen_melody": "MusicgenMelodyForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "autoformer": "AutoformerForPrediction",
    "informer": "InformerForPrediction",
    "time_series_transformer": "TimeSeriesTransformerForPrediction",
    "patchtst": "PatchTSTForPrediction",
    "patchtsmixer": "PatchTSMixerForPrediction",
}


def _resnet(**more: Any) -> dict[str, Any]:
    """A small ResNet instead of a backbone of timm."""
    from transformers import ResNetConfig

    backbone = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"]
    )
    return {
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": backbone,
        "num_queries": 5,
        **more,
    }


def _last_stage(**more: Any) -> dict[str, Any]:
    made = _resnet(**more)
    made["backbone_config"].out_features = ["stage4"]
    return made


_FORECAST = {"prediction_length": 4, "context_length": 6, "lags_sequence": [1, 2], "d_model": 16}


def _sections(half: int = 8, **more: Any) -> dict[str, Any]:
    """Rotary embeddings that share a head's dimensions between time, height and width."""
    section = [half - 2 * (half // 4), half // 4, half // 4]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}
    return {"num_attention_heads": 2, "num_key_value_heads": 2, "rope_parameters": rope, **more}


def _hybrid(**more: Any) -> dict[str, Any]:
    kinds = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
    return {"num_hidden_layers": 4, "layers_block_type": kinds, **more}


CONFIGS: dict[str, Callable[[], dict[str, Any]]] = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm_image_text", "glm_ocr_text"), _sections),
    **dict.fromkeys(
        ("qwen2_vl", "qwen2_5_vl", "glm4v", "glm46v", "glmga", "glm_ocr", "glm_image", "paddleocr_vl"),
        lambda: {"text_config": _sections()},
    ),
    "glm4v_moe_text": lambda: _sections(4, head_dim=16),
    "glm4v_moe": lambda: {"text_config": _sections(4, head_dim=16)},
    "zamba": lambda: _hybrid(attention_head_dim=16, attention_hidden_size=64, n_mamba_heads=2, num_key_value_heads=4),
    "zamba2": lambda: _hybrid(
        hybrid_layer_ids=[1, 3],
        n_mamba_heads=8,
        mamba_headdim=8,
        mamba_ngroups=1,
        attention_head_dim=16,
        attention_hidden_size=64,
        num_key_value_heads=4,
    ),
    "granitemoehybrid": lambda: {"layer_types": ["linear_attention", "full_attention"]},
    "swinv2": lambda: {
        "num_heads": [1, 2],
        "depths": [1, 1],
        "embed_dim": 16,
        "patch_size": 2,
        "image_size": 32,
        "pretrained_window_sizes": [0, 0],
    },
    "xmod": lambda: {"default_language": "en_XX"},
    "cohere_compass_text": lambda: {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "table-transformer": _last_stage,
    "textnet": lambda: {"hidden_sizes": [16, 16, 32, 32, 32], "stem_out_channels": 16, "stem_hidden_size": 16},
    "yolos": lambda: {"image_size": [32, 32], "patch_size": 16, "num_detection_tokens": 4},
    "swin": lambda: {"num_heads": [1, 2], "depths": [1, 1], "embed_dim": 16, "patch_size": 2, "image_size": 32},
    "donut-swin": lambda: {"num_heads": [1, 2], "depths": [1, 1], "embed_dim": 16, "patch_size": 2},
    "detr": _last_stage,
    "conditional_detr": _last_stage,
    "dab-detr": _last_stage,
    "deformable_detr": _resnet,
    "autoformer": lambda: dict(_FORECAST, moving_average=3),
    "informer": lambda: dict(_FORECAST),
    "time_series_transformer": lambda: dict(_FORECAST),
    "mamba2": lambda: {"num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 16},
    "layoutlmv3": lambda: {"coordinate_size": 4, "shape_size": 8, "input_size": 32, "visual_embed": False},
    "deepseek_v2": lambda: {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": lambda: {
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "longcat_flash": lambda: {
        "head_dim": 4,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "qk_head_dim": 12,
        "num_key_value_heads": 4,
    },
    "mobilebert": lambda: {"embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32},
    "mobilenet_v1": lambda: {"depth_multiplier": 0.1},
    "mobilenet_v2": lambda: {"depth_multiplier": 0.1},
    "mobilevitv2": lambda: {"width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1], "image_size": 64},
    "reformer": lambda: {
        "axial_pos_embds_dim": [16, 16],
        "axial_pos_shape": [8, 16],
        "attn_layers": ["local", "lsh"],
        "num_buckets": 4,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "perceiver": lambda: {
        "d_latents": 16,
        "d_model": 16,
        "num_latents": 5,
        "num_blocks": 1,
        "num_self_attends_per_block": 1,
        "num_self_attention_heads": 2,
        "num_cross_attention_heads": 2,
        "qk_channels": 16,
        "v_channels": 16,
    },
    "markuplm": lambda: {
        "max_depth": 5,
        "max_xpath_tag_unit_embeddings": 20,
        "max_xpath_subs_unit_embeddings": 20,
        "xpath_unit_hidden_size": 4,
    },
    "bros": lambda: {"dim_bbox": 8, "dim_bbox_projection": 8, "dim_bbox_sinusoid_emb_1d": 4},
    "lilt": lambda: {"hidden_size": 48, "channel_shrink_ratio": 4},
    "cpmant": lambda: {"prompt_types": 2, "prompt_length": 4, "segment_types": 4, "dim_head": 8, "dim_ff": 48},
    "cvt": lambda: {"embed_dim": [16, 16, 32], "num_heads": [1, 2, 2], "depth": [1, 1, 1]},
    "dpt": lambda: {
        "neck_hidden_sizes": [16, 16, 16, 16],
        "backbone_out_indices": [0, 0, 1, 1],
        "num_hidden_layers": 4,
        "fusion_hidden_size": 16,
    },
    "mpnet": lambda: {"pad_token_id": 1, "max_position_embeddings": 64},
    "moonshine": lambda: {"decoder_num_key_value_heads": 4, "encoder_num_key_value_heads": 4},
    "axk1": lambda: {"num_key_value_heads": 4},
    "clap": lambda: {},
    "mgp-str": lambda: {"num_bpe_labels": 20, "num_wordpiece_labels": 20, "num_character_labels": 10},
    "hgnet_v2": lambda: {
        "stem_channels": [3, 8, 8],
        "stage_in_channels": [8, 8, 16, 16],
        "stage_mid_channels": [8, 8, 8, 8],
        "stage_out_channels": [8, 16, 16, 32],
        "stage_num_blocks": [1, 1, 1, 1],
        "stage_numb_of_layers": [1, 1, 1, 1],
    },
    "efficientnet": lambda: {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 64},
    "nemotron": lambda: {"num_key_value_heads": 2},
    "patchtst": lambda: {
        "num_input_channels": 2,
        "context_length": 32,
        "prediction_length": 4,
        "patch_length": 4,
        "patch_stride": 4,
    },
    "patchtsmixer": lambda: {
        "num_input_channels": 2,
        "context_length": 32,
        "prediction_length": 4,
        "patch_length": 4,
        "patch_stride": 4,
        "d_model": 16,
    },
}


def _forecast(rows: int, seed: int) -> dict[str, Any]:
    past, future = 8, 4
    return {
        "past_values": _random(seed, rows, past),
        "past_time_features": _random(seed + 1, rows, past, 0),
        "past_observed_mask": torch.ones(rows, past),
        "future_values": _random(seed + 2, rows, future),
        "future_time_features": _random(seed + 3, rows, future, 0),
    }


def _decisions(rows: int, seed: int) -> dict[str, Any]:
    steps = 5
    return {
        "states": _random(seed, rows, steps, 17),
        "actions": _random(seed + 1, rows, steps, 4),
        "rewards": _random(seed + 2, rows, steps, 1),
        "returns_to_go": _random(seed + 3, rows, steps, 1),
        "timesteps": torch.arange(steps).repeat(rows, 1),
        "attention_mask": torch.ones(rows, steps, dtype=torch.long),
    }


INPUTS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "autoformer": _forecast,
    "informer": _forecast,
    "time_series_transformer": _forecast,
    "decision_transformer": _decisions,
    "patchtst": lambda rows, seed: {"past_values": _random(seed, rows, 32, 2)},
    "patchtsmixer": lambda rows, seed: {"past_values": _random(seed, rows, 32, 2)},
    "bros": lambda rows, seed: {"input_ids": _ids(seed, rows, 7), "bbox": _random(seed + 1, rows, 7, 8).abs()},
    "blip_2_qformer": lambda rows, seed: {"query_embeds": _random(seed, rows, 5, 32)},
    "audio-spectrogram-transformer": lambda rows, seed: {"input_values": _random(seed, rows, 128, 16)},
    "lxmert": lambda rows, seed: {
        "input_ids": _ids(seed, rows, 7),
        "visual_feats": _random(seed + 1, rows, 3, 2048),
        "visual_pos": _random(seed + 2, rows, 3, 4),
    },
    "granite_docling_vision": lambda rows, seed: {"pixel_values": _random(seed, rows, 3, 32, 32)},
    "idefics3_vision": lambda rows, seed: {"pixel_values": _random(seed, rows, 3, 32, 32)},
    "moss_transcribe_diarize_audio": lambda rows, seed: {"input_features": _random(seed, rows, 16, 256)},
    "qwen2_audio_encoder": lambda rows, seed: {"input_features": _random(seed, rows, 16, 256)},
    "lightglue": lambda rows, seed: {"pixel_values": _random(seed, rows, 2, 3, 32, 32)},
    **dict.fromkeys(
        ("timesformer", "videomae", "vivit"),
        lambda rows, seed: {"pixel_values": _random(seed, rows, 4, 3, 32, 32)},
    ),
    "voxtral_encoder": lambda rows, seed: {"input_features": _random(seed, rows, 16, 256)},
    "smolvlm_vision": lambda rows, seed: {"pixel_values": _random(seed, rows, 3, 32, 32)},
    "splinter": lambda rows, seed: {"input_ids": torch.cat([_ids(seed, rows, 6), torch.full((rows, 1), 2)], 1)},
    "seggpt": lambda rows, seed: {
        "pixel_values": _random(seed, rows, 3, 32, 32),
        "prompt_pixel_values": _random(seed + 1, rows, 3, 32, 32),
        "prompt_masks": _random(seed + 2, rows, 3, 32, 32),
    },
    "clap": lambda rows, seed: {"input_ids": _ids(seed, rows, 7), "input_features": _random(seed, rows, 1, 64, 16)},
    "encodec": lambda rows, seed: {"input_values": _random(seed, rows, 1, 640)},
}
