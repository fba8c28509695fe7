"""Models of timm, one of nearly every family, as small as their builders allow, on images of 64 by 64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from .case import Built, Case, Inputs, NoCaseError, fill

SIZE = 64
VIT = {"img_size": SIZE, "embed_dim": 48, "depth": 2, "num_heads": 3}
SWIN = {"img_size": SIZE, "depths": (2, 2), "embed_dim": 24, "num_heads": (1, 2), "window_size": 4}
STAGES = {"depths": (1, 1, 1, 1)}
# Arguments of timm.create_model. A builder's own sizes where there are none.
NAMES: dict[str, dict[str, Any]] = {
    "beit_base_patch16_224": VIT,
    "cait_xxs24_224": {**VIT, "num_heads": 4},
    "coat_tiny": {"img_size": SIZE},
    "convit_tiny": {**VIT, "embed_dim": 24, "num_heads": 4},
    "cpubone_nano": {},
    "cs3darknet_focus_s": {},
    "cspnext_tiny": {},
    "davit_tiny": {**STAGES, "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)},
    "deit_tiny_distilled_patch16_224": VIT,
    "densenet121": {"growth_rate": 8, "block_config": (1, 2, 2, 1)},
    "dla34": {"levels": (1, 1, 1, 1, 1, 1), "channels": (8, 16, 24, 32, 40, 48)},
    "dpn48b": {"k_sec": (1, 1, 1, 1)},
    "edgenext_xx_small": {},
    "efficientformerv2_s0": {"img_size": SIZE},
    "efficientvim_m1": {},
    "efficientvit_b0": {},
    "efficientvit_m0": {"img_size": 128},
    "eva02_tiny_patch14_224": {"img_size": 56, "depth": 2},
    "fasternet_t0": {},
    "ghostnet_050": {},
    "hardcorenas_a": {},
    "hgnetv2_b0": {},
    "hiera_tiny_224": {"img_size": SIZE, "embed_dim": 24, "stages": (1, 1, 1, 1)},
    "iformer_t": {},
    "inception_next_atto": {},
    "lcnetv2_small": {},
    "levit_128s": {"img_size": SIZE},
    "mobilenetv3_small_050": {},
    "mobilevit_xxs": {},
    "mobilevitv2_050": {},
    "pit_ti_224": {"img_size": SIZE, "depth": (1, 1, 1)},
    "pvt_v2_b0": {"depths": (1, 1, 1, 1)},
    "regnetx_002": {},
    "regnety_002": {},
    "repghostnet_050": {},
    "repvit_m0_9": {},
    "res2net50_14w_8s": {"layers": (1, 1, 1, 1)},
    "resnest14d": {"layers": (1, 1, 1, 1)},
    "resnet10t": {},
    "rexnet_100": {},
    "seresnet18": {"layers": (1, 1, 1, 1)},
    "sequencer2d_s": {"layers": (1, 1, 1, 1), "embed_dims": (24, 24, 24, 24), "hidden_sizes": (8, 8, 8, 8)},
    "shvit_s1": {},
    "skresnet18": {"layers": (1, 1, 1, 1)},
    "starnet_s050": {},
    "swiftformer_xs": {},
    "swin_tiny_patch4_window7_224": SWIN,
    "swinv2_tiny_window8_256": SWIN,
    "swinv2_cr_tiny_224": SWIN,
    "test_byobnet": {},
    "test_coatnet": {},
    "test_convnext": {},
    "test_efficientnet": {},
    "test_mambaout": {},
    "test_nfnet": {},
    "test_resnet": {},
    "test_vit": {"img_size": SIZE},
    "tiny_vit_5m_224": {},
    "tnt_s_patch16_224": {"img_size": SIZE, "embed_dim": 48, "depth": 2},
    "tresnet_m": {"layers": (1, 1, 1, 1), "width_factor": 0.25},
    "twins_svt_small": {
        "img_size": SIZE,
        "embed_dims": (16, 32, 48, 64),
        "num_heads": (1, 2, 3, 4),
        "depths": (2, 2, 2, 2),
    },
    "vit_relpos_small_patch16_224": VIT,
    "xcit_nano_12_p16_224": {**VIT, "num_heads": 4},
}


def cases() -> Iterator[Case]:
    """One case for each name; none where timm is not installed."""
    try:
        import timm
    except ImportError:
        return
    for name in NAMES:
        if timm.is_model(name):
            yield Case(f"timm/{name}", partial(_build, name), "")


def _build(name: str) -> Built:
    import timm

    torch.manual_seed(0)
    arguments = NAMES[name]
    try:
        model = fill(timm.create_model(name, pretrained=False, num_classes=5, **arguments))
    except Exception as error:
        raise NoCaseError(f"it cannot be made: {type(error).__name__}: {error}") from error
    size = arguments.get("img_size", 160 if name.startswith("test_") else SIZE)
    return Built(model, partial(_images, size), [0])


def _images(size: int, member: int, rows: int) -> Inputs:
    return (torch.randn((rows, 3, size, size), generator=torch.Generator().manual_seed(17 * member + rows)),), {}
