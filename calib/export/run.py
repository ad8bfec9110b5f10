"""``calib export``: a head and a cache of its detector to a file that needs no calib."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from calib.artifact import Artifact, check_fits, load
from calib.cache import Cache
from calib.checkpoint import Checkpoint
from calib.errors import ExistsError, InputError, SettingError, UnknownNameError, UnsupportedError
from calib.export import graph, triton
from calib.export.check import Sample
from calib.export.fold import LAYERS, apply_all, folds_of, scores_of
from calib.export.predictor import CalibratedLogits, Predictor, scale_for
from calib.files import is_calib_folder, replacing, write_text
from calib.heads.base import Head

GRAPHS = ("onnx", "torch", "torchscript", "module", "triton")
TARGETS = (*LAYERS, *GRAPHS)


@dataclass(frozen=True)
class Export:
    """What is asked for. ``checkpoint`` and ``layer`` are of folds, ``name`` of Triton's model; ``part`` names one head
    of a composed one (tail, rest, one, other). ``rows`` of the cache are compared, to ``tolerance``."""

    to: str
    checkpoint: Path | None = None
    layer: str = ""
    part: str = ""
    name: str = ""
    rows: int = 2048
    tolerance: float = 1e-5
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.to not in TARGETS:
            raise UnknownNameError("export", self.to, TARGETS)
        if (self.checkpoint is not None) != (self.to in LAYERS):
            raise SettingError(
                f"--to {self.to} {'needs the' if self.to in LAYERS else 'takes no'} checkpoint of the detector",
                hint=f"--checkpoint goes with --to {', '.join(LAYERS)}",
            )
        for name, value, targets in (("layer", self.layer, tuple(LAYERS)), ("name", self.name, ("triton",))):
            if value and self.to not in targets:
                raise SettingError(f"--{name} goes with --to {', '.join(targets)}")


def export(head: Path, cache: Path, out: Path, wanted: Export) -> dict[str, Any]:
    """Write the head at ``head`` to ``out`` and return what there is to say of it, the largest difference above all.

    Raises:
        ExportError: it differs from the head by more than the tolerance; nothing is left behind.
        CalibError: as ``artifact.load``, ``Cache``, ``Fold``, ``graph`` and ``triton``.
    """
    artifact, opened = load(head), Cache(cache)
    check_fits(artifact, opened, head)
    if opened.manifest.detector.stages > 1 and wanted.to == "module":
        raise UnsupportedError(
            f"--to module is one predictor inside the detector; a cascade of {opened.manifest.detector.stages} stages "
            "has one per stage, and averages what they give",
            hint="--to detectron2 or mmdet folds linear heads; onnx, torch and triton take the features of all stages",
        )
    if opened.manifest.detector.activation == "seesaw" and (wanted.to in LAYERS or wanted.to == "module"):
        raise UnsupportedError(
            f"--to {wanted.to} goes into the detector, whose seesaw activation takes an objectness pair beside classes",
            hint="--to torch, torchscript, onnx or triton: scores from features",
        )
    artifact = replace(artifact, head=part_of(artifact.head, wanted.part))
    if any(is_calib_folder(p) for p in (out.resolve(), *out.resolve().parents)):
        raise ExistsError(f"{out} lies inside a head or a cache", hint="choose another --out")
    sample = Sample.of(opened, artifact.head, wanted.rows, wanted.tolerance)
    writers = {"module": _module, "triton": _triton} | dict.fromkeys(LAYERS, _fold)
    written = writers.get(wanted.to, _graph)(_Job(head, artifact, opened, out, wanted, sample))
    figures = {"export": str(out), "to": wanted.to, "head": str(head), "kind": artifact.head.kind}
    compared = {"rows": len(sample.rows), "tolerance": wanted.tolerance}
    return figures | written | compared


@dataclass(frozen=True)
class _Job:
    folder: Path
    artifact: Artifact
    cache: Cache
    out: Path
    wanted: Export
    sample: Sample

    @property
    def width(self) -> int:
        return self.artifact.head.feature_size


def part_of(head: Head, part: str) -> Head:
    """The head called ``part`` inside ``head``, or itself.

    Raises:
        UnknownNameError: it has no such part.
    """
    parts = {name: module for name, module in head.named_modules() if isinstance(module, Head) and name}
    if part and part not in parts:
        known = f"parts of this head: {', '.join(parts)}" if parts else "this head is not composed of others"
        raise UnknownNameError("part", part, parts, hint=known)
    return parts[part] if part else head


def _fold(job: _Job) -> dict[str, Any]:
    assert job.wanted.checkpoint is not None
    if job.out.resolve() == job.wanted.checkpoint.resolve():
        raise InputError(f"{job.out} is the checkpoint itself: it is not replaced", hint="choose another --out")
    if job.out.suffix != job.wanted.checkpoint.suffix:
        raise InputError(
            f"{job.out} has another ending than {job.wanted.checkpoint}",
            hint=f"the format stays as it is: --out {job.out.with_suffix(job.wanted.checkpoint.suffix)}",
        )
    checkpoint = Checkpoint.read(job.wanted.checkpoint)
    folds, average = (
        folds_of(checkpoint, job.cache, job.wanted.to, job.wanted.layer),
        job.cache.manifest.detector.average,
    )
    apply_all(folds, job.artifact.head, checkpoint, average)
    with replacing(job.out) as temporary:
        checkpoint.write(temporary)
        again = Checkpoint.read(temporary, job.out.suffix)
        what = f"the checkpoint for {job.wanted.to}"
        largest = job.sample.compare(lambda rows: scores_of(folds, again, rows, average), what)
    background = "first" if folds[0].first else "last"
    told = {"layer": ", ".join(f.layer for f in folds), "background": background}
    more = {"entry": [checkpoint.entry], "unchanged": checkpoint.copies, "left_out": checkpoint.unwritten()}
    told |= {name: ", ".join(entries) for name, entries in more.items() if any(entries)}
    return told | {"largest_difference": largest}


def _graph(job: _Job) -> dict[str, Any]:
    module = graph.Scores(job.artifact.head)
    with replacing(job.out) as temporary:
        largest = _write_graph(job, module, temporary)
    return _interface(job) | {"largest_difference": largest}


def _write_graph(job: _Job, module: nn.Module, path: Path) -> float:
    read: Callable[[Path], graph.Run]
    if job.wanted.to == "torch":
        graph.write_program(module, job.width, path)
        read = graph.read_program
    elif job.wanted.to == "torchscript":
        graph.write_torchscript(module, job.width, path)
        read = graph.read_torchscript
    else:
        graph.write_onnx(module, job.width, path, _properties(job.artifact))
        read = graph.read_onnx
    return job.sample.compare(read(path), f"the export to {job.wanted.to}")


def _interface(job: _Job) -> dict[str, Any]:
    """Names and shapes; an ONNX model's opset."""
    shapes = {"input": f"{graph.INPUT} [N, {job.width}]", "output": f"{graph.OUTPUT} [N, {job.sample.scores.shape[1]}]"}
    return shapes | ({"opset": graph.OPSET} if job.wanted.to in ("onnx", "triton") else {})


def _properties(artifact: Artifact) -> dict[str, str]:
    info = asdict(artifact.info)
    kept = ("method", "category_ids", "category_names", "detector_digest", "calib_version")
    return {"kind": artifact.head.kind, "inputs": artifact.head.inputs} | {
        k: info[k] if isinstance(info[k], str) else json.dumps(info[k]) for k in kept
    }


def _module(job: _Job) -> dict[str, Any]:
    logits = CalibratedLogits(job.artifact, 1.0)
    if not logits.sigmoid:
        logits.scale = scale_for(job.sample.scores)
    agnostic = job.cache.manifest.detector.class_agnostic
    module = Predictor(logits, job.cache.classifier, class_agnostic=agnostic)
    with replacing(job.out) as temporary:
        graph.write_program(module, job.width, temporary)
        program = graph.read_program(temporary)
        largest = job.sample.compare(lambda rows: logits.scores(program(rows)[0]), "the module")
    return {"input": job.artifact.head.inputs, "scale": logits.scale, "largest_difference": largest}


def _triton(job: _Job) -> dict[str, Any]:
    name, model = triton.place(job.out, job.folder, job.wanted.name, overwrite=job.wanted.overwrite)
    with TemporaryDirectory() as scratch:  # an export that is refused leaves no folders
        checked = Path(scratch) / model.name
        largest = _write_graph(job, graph.Scores(job.artifact.head), checked)
        write_text(model.parent.parent / "config.pbtxt", triton.config(name, job.artifact))
        with replacing(model) as temporary:
            shutil.copyfile(checked, temporary)
    return {"model": name, "version": model.parent.name} | _interface(job) | {"largest_difference": largest}
