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

SOFTMAX = ("detr", "table-transformer")
EVERY_QUERY = ("rt-detr", "rt-detr-v2", "d-fine")  # as many detections as queries; the other sigmoid detectors 100


def build(family: str, seed: int = 0) -> tuple[Any, Any]:
    """The model in eval mode and its processor; scores of queries and classes differ enough to be ranked."""
    import transformers

    name, processor, settings, is_rt, levels = FAMILIES[family]
    resnet = transformers.RTDetrResNetConfig if is_rt else transformers.ResNetConfig
    stages = [f"stage{k}" for k in range(5 - levels, 5)]
    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4}
    backbone = resnet(**sizes, layer_type="basic", out_features=stages)
    if not is_rt:
        settings = settings | {"use_timm_backbone": False}
    config = getattr(transformers, f"{name}Config")(
        backbone_config=backbone, num_labels=CLASSES, **(_LAYERS | settings)
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForObjectDetection")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "class" in key and parameter.ndim == 2:
                parameter.normal_(std=0.5)
            if "query" in key and "embed" in key:
                parameter.normal_(std=2)
    size = {"height": 64, "width": 64} if is_rt else _SIZE
    return model, getattr(transformers, f"{processor}ImageProcessor")(size=size)
