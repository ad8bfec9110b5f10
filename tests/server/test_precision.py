"""The service in bfloat16, and on a GPU where there is one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from calib.artifact import save
from calib.client import Client
from calib.errors import NonFiniteError
from calib.server.compute import Compute

from .conftest import FEATURE_SIZE, artifact, running


def test_a_service_in_bfloat16_says_so(tmp_path: Path, features: NDArray[Any]) -> None:
    save(tmp_path / "models" / "head" / "1", artifact(1))
    exact = artifact(1).head.scores(torch.from_numpy(features)).detach().numpy()
    with (
        running(tmp_path / "models", tmp_path / "log", precision="bf16") as server,
        Client(server.url, trust_env=False) as client,
    ):
        found = client.scores("head", features)
        assert client.metadata("head")["parameters"]["precision"] == "bf16"
    assert found.dtype == np.float32 and not np.array_equal(found, exact)
    np.testing.assert_allclose(found, exact, atol=0.05)


def test_what_is_not_finite_is_refused() -> None:
    compute, head = Compute(), Compute().prepare(artifact(1).head)
    for value in (np.nan, np.inf):
        with pytest.raises(NonFiniteError, match="features"):
            compute.scores(head, torch.full((2, FEATURE_SIZE), value))
    with pytest.raises(NonFiniteError, match="too large for this head"):
        compute.scores(head, torch.full((2, FEATURE_SIZE), 3e38))
    assert compute.scores(head, torch.zeros(0, FEATURE_SIZE)).shape == (0, 6)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_gives_nearly_the_same_scores(features: NDArray[Any], precision: str) -> None:
    x = torch.from_numpy(features)
    cpu = Compute("cpu", "fp32")
    exact = cpu.scores(cpu.prepare(artifact(1).head), x)
    gpu = Compute("cuda", precision)
    head = gpu.prepare(artifact(1).head)
    for rows in (len(x), 3, len(x)):  # staging memory is reused for fewer rows
        found = gpu.scores(head, x[:rows].half())
        np.testing.assert_allclose(found, exact[:rows], atol=1e-4 if precision == "fp32" else 0.05)
