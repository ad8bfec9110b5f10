"""Tiny decoder detectors of transformers with random weights, and their image processors."""

from typing import Any

import torch

CLASSES = 4
QUERIES = 20
_LAYERS = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": QUERIES,
}
_RT = {"encoder_hidden_dim": 32, "encoder_in_channels": [8, 16, 16], "decoder_in_channels": [32] * 3} | {
    "num_denoising": 0
}
_SIZE = {"shortest_edge": 128, "longest_edge": 192}
_SQUARE = {"height": 64, "width": 64}
_GROUPS = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_ffn_dim": 32,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
    "decoder_n_points": 2,
    "group_detr": 2,
    "num_queries": QUERIES,
}
_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 8}
_STAGES = {"out_features": ["stage1", "stage2"], "mlp_ratio": 2}
# With backbones of their own: name -> class, processor, its size, settings, class and settings of the backbone
OTHERS: dict[str, tuple[str, str, dict[str, int], dict[str, Any], str, dict[str, Any]]] = {
    "lw-detr": (
        "LwDetr",
        "DeformableDetr",
        _SQUARE,
        _GROUPS | {"projector_scale_factors": [1.0]},
        "LwDetrViT",
        _VIT | _STAGES | {"pretrain_image_size": 64, "num_windows": 4, "window_block_indices": [0]},
    ),
    "rf-detr": ("RfDetr", "RfDetr", _SQUARE, _GROUPS, "RfDetrDinov2", _VIT | _STAGES | {"num_windows": 2}),
    "deimv2": (
        "Deimv2",
        "RTDetr",
        _SQUARE,
        _LAYERS | {"encoder_hidden_dim": 32, "encoder_in_channels": [16] * 3, "decoder_in_channels": [32] * 3},
        "HGNetV2",
        {
            "stem_channels": [3, 8, 8],
            "stage_in_channels": [8, 8, 16, 16],
            "stage_mid_channels": [8] * 4,
            "stage_out_channels": [8, 16, 16, 16],
            "stage_num_blocks": [1] * 4,
            "stage_numb_of_layers": [1] * 4,
            "stage_downsample": [False, True, True, True],
            "stage_light_block": [False] * 4,
            "stage_kernel_size": [3] * 4,
            "embedding_size": 8,
            "hidden_sizes": [8, 16, 16, 16],
            "depths": [1] * 4,
            "out_features": ["stage2", "stage3", "stage4"],
        },
    ),
    "yolos": (
        "Yolos",
        "Yolos",
        _SIZE,
        _VIT | {"hidden_size": 32, "intermediate_size": 32, "image_size": [64, 64], "num_detection_tokens": QUERIES},
        "",
        {},
    ),
}
# name -> class, processor, further settings, whether the backbone is RT-DETR's, levels that the backbone gives
FAMILIES: dict[str, tuple[str, str, dict[str, Any], bool, int]] = {
    "detr": ("Detr", "Detr", {}, False, 1),
    "table-transformer": ("TableTransformer", "Detr", {}, False, 1),
    "dab": ("DabDetr", "ConditionalDetr", {"hidden_size": 32}, False, 1),
    "conditional": ("ConditionalDetr", "ConditionalDetr", {}, False, 1),
    "deformable": ("DeformableDetr", "DeformableDetr", {}, False, 3),
    "deformable-refined": (
        "DeformableDetr",
        "DeformableDetr",
        {"with_box_refine": True, "two_stage": True, "two_stage_num_proposals": QUERIES},
        False,
        3,
    ),
    "rt-detr": ("RTDetr", "RTDetr", _RT, True, 3),
    "d-fine": ("DFine", "RTDetr", _RT, True, 3),
    "rt-detr-v2": ("RTDetrV2", "RTDetr", _RT, True, 3),
}

ALL = (*FAMILIES, *OTHERS)
SOFTMAX = ("detr", "table-transformer", "yolos")
EVERY_QUERY = (
    "rt-detr",
    "rt-detr-v2",
    "d-fine",
    "rf-detr",
    "deimv2",
)  # as many detections as queries; the other sigmoid detectors 100


def build(family: str, seed: int = 0) -> tuple[Any, Any]:
    """The model in eval mode and its processor; scores of queries and classes differ enough to be ranked."""
    import transformers

    torch.manual_seed(seed)
    name, processor, size, settings = (_other if family in OTHERS else _common)(transformers, family)
    config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **settings)
    model = getattr(transformers, f"{name}ForObjectDetection")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "class" in key and parameter.ndim == 2:
                parameter.normal_(std=0.5)
            if ("query" in key and "embed" in key) or "detection_tokens" in key:
                parameter.normal_(std=2)
        for layer in getattr(model.model, "enc_out_class_embed", ()) if hasattr(model, "model") else ():
            layer.load_state_dict(model.class_embed.state_dict())  # so they begin: equal, and not the same
    return model, getattr(transformers, f"{processor}ImageProcessor")(size=size)


def _common(transformers: Any, family: str) -> tuple[str, str, dict[str, int], dict[str, Any]]:
    name, processor, settings, is_rt, levels = FAMILIES[family]
    resnet = transformers.RTDetrResNetConfig if is_rt else transformers.ResNetConfig
    stages = [f"stage{k}" for k in range(5 - levels, 5)]
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4}
    backbone = resnet(**sizes, layer_type="basic", out_features=stages)
    if not is_rt:
        settings = settings | {"use_timm_backbone": False}
    return name, processor, _SQUARE if is_rt else _SIZE, _LAYERS | settings | {"backbone_config": backbone}


def _other(transformers: Any, family: str) -> tuple[str, str, dict[str, int], dict[str, Any]]:
    name, processor, size, settings, backbone, own = OTHERS[family]
    if backbone:
        settings = settings | {"backbone_config": getattr(transformers, f"{backbone}Config")(**own)}
    return name, processor, size, settings
