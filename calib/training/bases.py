"""What a head is built on: the base of its fit, or the detector's own classifier where there is none.

A base is a fitted head that has logits. Methods that transform logits take ``base_logits``; those that scale weights,
or train them on, take ``base_layer``, the linear layer that the base folds to.
"""

from copy import deepcopy

from calib.cache import Cache
from calib.errors import UnsupportedError
from calib.heads.affine import AffineHead
from calib.heads.base import Head, LogitHead
from calib.heads.detector import detector_head
from calib.heads.linear import LinearClassifier, LinearHead, Logits
from calib.training.context import FitContext


def base_of(context: FitContext) -> LogitHead | None:
    """A frozen copy of the base of ``context``, if it has one.

    Raises:
        UnsupportedError: the base has no logits of one softmax, or of sigmoids.
    """
    base = context.base
    if base is None:
        return None
    if not isinstance(base, LogitHead) or not base.distribution:
        raise UnsupportedError(
            f"a head of kind '{base.kind}' is no base: its scores are no softmax of logits, nor sigmoids of them",
            hint="bases are heads like those of natural, crt, seesaw, disalign or logit-adjustment",
        )
    return deepcopy(base).eval().requires_grad_(False)


def activation_of(cache: Cache, context: FitContext) -> str:
    """softmax, sigmoid or seesaw: of the base, or of the detector."""
    base = base_of(context)
    return cache.manifest.detector.activation if base is None else base.distribution


def base_logits(cache: Cache, context: FitContext) -> Logits:
    """What gives the logits of the base, or of the detector; the linear layer of a base that has one.

    Raises:
        UnsupportedError: as ``base_of``.
    """
    base = base_of(context)
    if base is not None:
        try:
            return base_layer(cache, context)
        except UnsupportedError:  # no linear layer
            return base
    return LinearClassifier.of(cache.classifier)


def base_layer(cache: Cache, context: FitContext) -> LinearClassifier:
    """A copy of the linear layer of the base, or of the detector's.

    Raises:
        UnsupportedError: as ``base_of``; the base is no linear layer.
    """
    base = base_of(context)
    if base is None:
        return LinearClassifier.of(cache.classifier)
    if isinstance(base, LinearHead):  # of any form
        own = base.classifier
        return LinearClassifier(own.weight, own.bias, own.scale, own.form)
    try:
        weight, bias, _ = base.folded()
    except UnsupportedError as e:
        raise UnsupportedError(
            f"the weights of the base are needed, and it is no linear layer: {e}",
            hint="methods that take logits alone, like logit-adjustment and norcal, are built on it",
        ) from e
    return LinearClassifier(weight, bias)


def refuse_base(context: FitContext, why: str) -> None:
    """Raise UnsupportedError where there is a base, for a method that has no use for one."""
    if context.base is not None:
        raise UnsupportedError(f"a base has no part in this training: {why}", hint="leave the base out")


def affine_head(cache: Cache, context: FitContext, renormalise: str = "none") -> AffineHead:
    """An affine head that changes nothing yet, over the logits of the base or the detector.

    Raises:
        UnsupportedError: as ``base_of``.
    """
    below = base_logits(cache, context)
    return AffineHead(below, renormalise=renormalise, detector_logits=context.base is None)


def head_below(cache: Cache, context: FitContext) -> Head:
    """The base, or the detector's own head; raises as ``base_of``."""
    return base_of(context) or detector_head(cache)
