"""Heads as graphs without Python: torch.export programs, TorchScript, ONNX. N, the number of rows, stays free."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calib.errors import MissingExtraError
from calib.heads.base import Head

OPSET = 18  # read by onnxruntime 1.14 (2023) and later
# The names that the service has, too: one client works with both.
INPUT, OUTPUT = "FEATURES", "SCORES"
Run = Callable[[Tensor], Tensor]
_jit: Any = torch.jit  # has no types


class Scores(nn.Module):
    """[N, D] -> [N, C]: ``Head.scores`` without its checks, which a graph cannot hold."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        """[N, D] -> [N, C]."""
        return self.head.full_scores(features)[:, :-1]


def exported(module: nn.Module, width: int) -> torch.export.ExportedProgram:
    """The program of ``module`` for [N, width], any N."""
    with _quiet():
        return torch.export.export(module.eval(), (_example(width),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


def write_program(module: nn.Module, width: int, path: Path) -> None:
    """Write a torch.export program (.pt2)."""
    program = exported(module, width)
    with _quiet(), open(path, "wb") as file:
        torch.export.save(program, file)


def read_program(path: Path) -> nn.Module:
    """The module of a program."""
    with _quiet(), open(path, "rb") as file:
        module: nn.Module = torch.export.load(file).module()
    return module


def write_torchscript(module: nn.Module, width: int, path: Path) -> None:
    """Write a trace as TorchScript, which torch itself has deprecated."""
    with _quiet(), torch.no_grad():
        _jit.trace(module.eval(), (_example(width),), check_trace=False).save(str(path))


def read_torchscript(path: Path) -> Run:
    """The module of a trace."""
    with _quiet():
        module: Run = _jit.load(str(path))
    return module


def write_onnx(module: nn.Module, width: int, path: Path, metadata: dict[str, str]) -> None:
    """Write an ONNX model of opset ``OPSET`` with weights inside and ``metadata`` as its properties.

    Raises:
        MissingExtraError: onnx or onnxscript is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter needs it
    except ImportError:
        raise MissingExtraError("onnx", "export") from None
    program = exported(module, width)
    with _quiet():
        written = torch.onnx.export(
            program,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    assert written is not None
    model = written.model_proto
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "N"
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())


def read_onnx(path: Path) -> Run:
    """The model in onnxruntime, on the CPU.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("onnxruntime", "export") from None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(rows: Tensor) -> Tensor:
        (scores,) = session.run([OUTPUT], {INPUT: np.ascontiguousarray(rows.numpy())})
        return torch.from_numpy(scores)

    return run


def _example(width: int) -> Tensor:
    return torch.ones(4, width)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch warns of deprecated parts of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
