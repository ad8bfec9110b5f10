"""The iterative head on RoI maps (He et al., Pairwise Class Balance, CVPR 2022, Sec. 3.3).

f_0: RoI map [channels, h, w]. Every pass: x = relu(fc2(relu(fc1(f)))), z = x W^T + b, d = box regression of x, and
f <- f * MLP_loc(d) [1, h, w] + MLP_cls(z) [channels, 1, 1], with the same layers each time. Scores: the last pass.
The MLPs are those of ``iterative.py``; the authors' code can have a LayerNorm before that of the logits only.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn

from calib.cache import Cache
from calib.heads.base import Head
from calib.heads.box_head import require_maps
from calib.heads.iterative import EXTRA_COLUMNS, activated, feedback, feedback_layers, reset_feedback
from calib.heads.linear import LinearClassifier


class IterativeMapHead(Head):
    """``sizes``: channels, h, w of the map; H of fc1, D of fc2, outputs K, box outputs, hidden units of the MLPs.
    ``layer_norm``: of ``iterative.LAYER_NORMS``."""

    kind = "iterative-map"
    not_linear = "it works on RoI maps, in several passes"

    def __init__(
        self,
        sizes: dict[str, int],
        *,
        activation: str,
        iterations: int,
        mlp_layers: int = 2,
        layer_norm: str = "none",
    ) -> None:
        s = sizes
        map_size = s["channels"] * s["height"] * s["width"]
        super().__init__(s["outputs"] - EXTRA_COLUMNS[activation], map_size, "maps")
        self.mlp_layers, self.layer_norm = mlp_layers, layer_norm
        self.sizes, self.activation, self.iterations = sizes, activation, iterations
        self.fc1, self.fc2 = nn.Linear(self.feature_size, s["fc1"]), nn.Linear(s["fc1"], s["fc2"])
        self.classifier = LinearClassifier(torch.zeros(s["outputs"], s["fc2"]), torch.zeros(s["outputs"]))
        self.regression = nn.Linear(s["fc2"], s["box_outputs"])
        area = s["height"] * s["width"]
        self.mlp_cls = nn.ModuleList(feedback_layers(s["outputs"], s["hidden"], s["channels"], mlp_layers))
        self.mlp_loc = nn.ModuleList(feedback_layers(s["box_outputs"], s["hidden"], area, mlp_layers))
        self.norm_cls = nn.LayerNorm(s["outputs"]) if layer_norm != "none" else None
        self.norm_loc = nn.LayerNorm(s["box_outputs"]) if layer_norm == "both" else None

    @classmethod
    def of(cls, cache: Cache, classifier: LinearClassifier, *, hidden: int, **form: Any) -> Self:
        """With the frozen box head and regression of ``cache``; ``classifier`` and the MLPs are what is trained.
        ``form``: the other arguments of the class."""
        require_maps(cache)
        c, (channels, height, width) = cache.classifier, cache.manifest.roi_maps
        parts = {
            n: getattr(c, n) for n in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "box_weight", "box_bias")
        }
        sizes = {"channels": channels, "height": height, "width": width, "hidden": hidden}
        sizes |= {"fc1": len(parts["fc1_bias"]), "fc2": len(parts["fc2_bias"]), "box_outputs": len(parts["box_bias"])}
        head = cls(sizes | {"outputs": len(classifier.weight)}, **form)
        head.classifier = classifier
        for layer, name in ((head.fc1, "fc1"), (head.fc2, "fc2"), (head.regression, "box")):
            layer.weight.data.copy_(torch.from_numpy(parts[f"{name}_weight"]))
            layer.bias.data.copy_(torch.from_numpy(parts[f"{name}_bias"]))
            layer.requires_grad_(False)
        return head

    def reset(self, generator: torch.Generator) -> None:
        """torch's default initialisation of the MLPs; their last layers such that every pass starts as the first."""
        reset_feedback([*self.mlp_cls], 0.0, generator)
        reset_feedback([*self.mlp_loc], 1.0, generator)

    def config(self) -> dict[str, Any]:
        """Sizes, form of the classifier, activation, passes, form of the MLPs."""
        form = {k: getattr(self, k) for k in ("activation", "iterations", "mlp_layers", "layer_norm")}
        return {"sizes": self.sizes, "classifier": self.classifier.config(), **form}

    @classmethod
    def build(cls, config: dict[str, Any]) -> Self:
        """Empty, of the shape in ``config``."""
        head = cls(**{k: v for k, v in config.items() if k != "classifier"})  # older heads do not tell their MLPs' form
        head.classifier = LinearClassifier.build(config["classifier"])
        return head

    def passes(self, maps: Tensor) -> list[Tensor]:
        """[N, channels * h * w] -> R times [N, K] logits."""
        return [z for z, _ in self.steps(maps)]

    def steps(self, maps: Tensor) -> list[tuple[Tensor, Tensor]]:
        """[N, channels * h * w] -> R times logits [N, K] and box deltas."""
        f = maps.reshape(maps.shape[0], *(self.sizes[k] for k in ("channels", "height", "width")))
        out = []
        for r in range(self.iterations):
            x = self.fc2(self.fc1(f.flatten(1)).relu()).relu()
            z, deltas = self.classifier(x), self.regression(x)
            out.append((z, deltas))
            if r + 1 < self.iterations:
                gain = feedback([*self.mlp_loc], self.norm_loc, deltas).reshape(f.shape[0], 1, *f.shape[2:])
                f = f * gain + feedback([*self.mlp_cls], self.norm_cls, z)[:, :, None, None]
        return out

    def full_scores(self, features: Tensor, logits: Tensor | None = None) -> Tensor:
        """[N, channels * h * w] -> [N, C+1]."""
        return activated(self.passes(features)[-1], self.activation)
