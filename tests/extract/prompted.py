"""Tiny detectors of transformers with random weights whose classes are prompts, and their processors."""

import string
from typing import Any

import torch

PROMPTED = {"grounding-dino": "GroundingDino", "mm-grounding-dino": "MMGroundingDino", "owlvit": "OwlViT"}
PROMPTED |= {"owlv2": "Owlv2"}
QUERIES = {"grounding-dino": 20, "mm-grounding-dino": 20, "owlvit": 25, "owlv2": 25}
TOKENS = 64


def build_prompted(family: str, seed: int = 0) -> tuple[Any, Any]:
    """The model in eval mode and its processor; scores of queries and prompts differ enough to be ranked."""
    import transformers

    torch.manual_seed(seed)
    name = PROMPTED[family]
    make = _grounding if "dino" in family else _owl
    model, processor = make(transformers, name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ("class_head" in key or "box_head" in key) and parameter.ndim == 2:
                parameter.normal_(std=0.5)
    return model.eval(), processor


def _grounding(transformers: Any, name: str) -> tuple[Any, Any]:
    vocabulary = {f"[unused{k}]": k for k in range(1, 1100)}
    # Where BERT has them: the model knows these numbers.
    special = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
    vocabulary = {t: k for t, k in vocabulary.items() if k not in special.values()} | special
    for k, sign in enumerate(string.ascii_lowercase + string.digits):
        vocabulary |= {sign: 1100 + 2 * k, f"##{sign}": 1101 + 2 * k}
    tokenizer = transformers.BertTokenizer(vocab=vocabulary)
    text = {"vocab_size": 1200, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1] * 4,
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("ffn_dim", 32), ("n_points", 2))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 2}
    config = getattr(transformers, f"{name}Config")(
        backbone_config=backbone,
        text_config=transformers.BertConfig(hidden_size=32, **text),
        d_model=32,
        num_queries=20,
        max_text_len=TOKENS,
        **sizes,
        **heads,
    )
    pictures = transformers.GroundingDinoImageProcessor(size={"shortest_edge": 128, "longest_edge": 192})
    processor = transformers.GroundingDinoProcessor(pictures, tokenizer)
    return getattr(transformers, f"{name}ForObjectDetection")(config), processor


def _owl(transformers: Any, name: str) -> tuple[Any, Any]:
    from tokenizers import pre_tokenizers

    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Token 0 marks a prompt that is none.
    tokens = ["<pad>", *signs, *(f"{s}</w>" for s in signs), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {t: k for k, t in enumerate(tokens)}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)
    both = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1}
    config = getattr(transformers, f"{name}Config")(
        text_config=both | ends | {"vocab_size": len(tokens), "max_position_embeddings": 16},
        vision_config=both | {"image_size": 40, "patch_size": 8},
        projection_dim=32,
    )
    pictures = getattr(transformers, f"{name}ImageProcessor")(size={"height": 40, "width": 40})
    processor = getattr(transformers, f"{name}Processor")(pictures, tokenizer)
    return getattr(transformers, f"{name}ForObjectDetection")(config), processor
