"""The head inside a peer: the same torch operations as calib's linear head, one thread, bytes to bytes."""

import os
import warnings

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

# A request body is read-only, and it is only read here.
warnings.filterwarnings("ignore", message="The given buffer is not writable")


class Head:
    """Weights from the file that ``SERVING_HEAD`` names."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        with np.load(os.environ["SERVING_HEAD"]) as stored:
            self.weight, self.bias = torch.from_numpy(stored["weight"]), torch.from_numpy(stored["bias"])

    def features(self, body: bytes) -> Tensor:
        """float16 bytes -> [N, D]."""
        return torch.frombuffer(body, dtype=torch.float16).view(-1, self.weight.shape[1])

    def scores(self, features: Tensor) -> np.ndarray:
        """[N, D] -> [N, C] float32, a view without the background column."""
        with torch.inference_mode():
            z = functional.linear(features.to(torch.float32), self.weight, self.bias)
            return z.softmax(dim=1)[:, :-1].numpy()

    def answer(self, body: bytes) -> bytes:
        """float16 bytes -> float32 bytes."""
        return self.scores(self.features(body)).tobytes()
