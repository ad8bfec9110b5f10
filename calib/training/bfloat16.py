"""Training with the large matrix products in bfloat16, whatever the head.

As ``bfloat16.py`` does for scores: inputs and weights of every linear layer are rounded, products are summed in
float32 and rounded once more; the gradients of both take the same way back. Weights, their momentum, losses and
everything else stay float32. The groups of TDE, which are no linear layer, stay float32 too.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class BFloat16Products(TorchFunctionMode):
    """Within this context ``functional.linear`` multiplies in bfloat16.

    torch's own autocast would also hand bfloat16 logits to the losses, whose running sums need float32.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called for every function of torch."""
        call = _linear if func is functional.linear else func
        return call(*args, **(kwargs or {}))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[N, D], [K, D], [K] -> [N, K] float32. A single output (DisAlign's confidence) costs nothing: not rounded."""
    if len(weight) == 1:
        return functional.linear(x, weight, bias)
    z = functional.linear(x.bfloat16(), weight.bfloat16()).float()
    return z if bias is None else z + bias
