"""``calib export``: a head and a cache of its detector to a file that needs no calib."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn

from calib.artifact import Artifact, check_fits, load
from calib.cache import Cache
from calib.cache.schema import Detector
from calib.checkpoint import Checkpoint
from calib.errors import ExistsError, InputError, SettingError, UnknownNameError, UnsupportedError
from calib.export import graph, triton
from calib.export.check import Sample
from calib.export.fold import LAYERS, apply_all, folds_of, scores_of
from calib.export.folder import folder_like, weights_in
from calib.export.predictor import CalibratedLogits, Predictor, check_proved, scale_for
from calib.files import is_calib_folder, replacing, write_text
from calib.heads.base import Head
from calib.heads.by_size import BySizeHead

GRAPHS = ("onnx", "torch", "torchscript", "module", "layer", "triton")
INSIDE = (*LAYERS, "module", "layer")  # what goes into the detector
TARGETS = (*LAYERS, *GRAPHS)


@dataclass(frozen=True)
class Export:
    """What is asked for. ``checkpoint`` and ``layer`` are of folds, ``name`` of Triton's model; ``part`` names one head
    of a composed one (tail, rest, one, other). ``rows`` of the cache are compared, to ``tolerance``. ``reader``: what
    reads and writes the checkpoint (``extract.frameworks.checkpoint_reader``)."""

    to: str
    checkpoint: Path | None = None
    layer: str = ""
    part: str = ""
    name: str = ""
    rows: int = 2048
    tolerance: float = 1e-5
    overwrite: bool = False
    reader: type[Checkpoint] = Checkpoint

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

    The comparison is of the head's layer. What the detector makes of its scores, the ``proof`` of the cache has seen.

    Raises:
        ExportError: it differs from the head by more than the tolerance; nothing is left behind.
        UnsupportedError: the head would go into a detector whose detections were not compared with the cache.
        CalibError: as ``artifact.load``, ``Cache``, ``Fold``, ``graph`` and ``triton``.
    """
    artifact, opened = load(head), Cache(cache)
    check_fits(artifact, opened, head)
    _check_target(wanted.to, artifact, opened.manifest.detector)
    proof: dict[str, Any] = {}
    if wanted.to in INSIDE:
        check_proved(opened.manifest.proof, f"cache {cache}")
        proof = {"proof": opened.manifest.proof_text()}
    artifact = replace(artifact, head=part_of(artifact.head, wanted.part))
    if isinstance(artifact.head, BySizeHead):
        raise UnsupportedError(
            "maps by box size act on detections; what is exported gives scores of proposals", hint="--part inner"
        )
    if any(is_calib_folder(p) for p in (out.resolve(), *out.resolve().parents)):
        raise ExistsError(f"{out} lies inside a head or a cache", hint="choose another --out")
    sample = Sample.of(opened, artifact.head, wanted.rows, wanted.tolerance)
    writers = {"module": _module, "layer": _module, "triton": _triton} | dict.fromkeys(LAYERS, _fold)
    written = writers.get(wanted.to, _graph)(_Job(head, artifact, opened, out, wanted, sample))
    record = {"export": str(out), "to": wanted.to, "head": str(head), "kind": artifact.head.kind}
    compared = {"rows": len(sample.rows), "tolerance": wanted.tolerance}
    return record | written | compared | proof


def _check_target(to: str, artifact: Artifact, detector: Detector) -> None:
    """
    Raises:
        UnsupportedError: ``to`` is of another framework than the detector, or the detector has no place for it.
    """
    framework = detector.source.partition(":")[0]
    if to in LAYERS and framework in LAYERS and to != framework:
        raise UnsupportedError(
            f"the cache is of a detector of {framework}: {detector.source}", hint=f"--to {framework} folds into it"
        )
    if to == "module" and framework in ("mmdet", "transformers"):
        raise UnsupportedError(
            f"--to module stands in for roi_heads.box_predictor, which detectors of {framework} do not have",
            hint="--to layer stands in for fc_cls" if framework == "mmdet" else "--to transformers folds linear heads",
        )
    if detector.settings.get("dense") and to in ("module", "layer"):
        raise UnsupportedError(
            f"--to {to} is one module inside the detector; a dense one has a convolution for each level",
            hint=f"--to {framework} folds linear heads",
        )
    if to == "layer" and (framework == "transformers" or artifact.head.inputs == "maps"):
        raise UnsupportedError(
            "--to layer stands in for a layer from the features of RoIs to their class logits",
            hint="--to transformers" if framework == "transformers" else "a head on RoI maps: --to module",
        )
    if detector.stages > 1 and to in ("module", "layer"):
        raise UnsupportedError(
            f"--to {to} is one module inside the detector; a cascade of {detector.stages} stages has one per stage, "
            "and averages what they give",
            hint="--to detectron2 or mmdet folds linear heads; onnx, torch and triton take the features of all stages",
        )
    if detector.activation == "seesaw" and to in INSIDE:
        raise UnsupportedError(
            f"--to {to} goes into the detector, whose seesaw activation takes an objectness pair beside classes",
            hint="--to torch, torchscript, onnx or triton: scores from features",
        )


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
    given, out = job.wanted.checkpoint, job.out
    assert given is not None
    if out.resolve() == given.resolve():
        raise InputError(f"{out} is the checkpoint itself: it is not replaced", hint="choose another --out")
    if given.is_dir():
        if job.wanted.to != "transformers":
            raise InputError(f"{given} is a folder, which checkpoints of transformers are", hint="name the file in it")
        weights = weights_in(given)
        with folder_like(given, out) as folder:
            return _fold_file(job, weights, folder / weights.name)
    if out.suffix != given.suffix:
        raise InputError(
            f"{out} has another ending than {given}",
            hint=f"the format stays as it is: --out {out.with_suffix(given.suffix)}",
        )
    with replacing(out) as temporary:
        return _fold_file(job, given, temporary)


def _fold_file(job: _Job, given: Path, out: Path) -> dict[str, Any]:
    """Write the weights ``given`` with the head in them to ``out``, and compare."""
    checkpoint, average = job.wanted.reader.read(given), job.cache.manifest.detector.average
    folds = folds_of(checkpoint, job.cache, job.wanted.to, job.wanted.layer)
    apply_all(folds, job.artifact.head, checkpoint, average)
    checkpoint.write(out)
    again = job.wanted.reader.read(out, given.suffix)
    what = f"the checkpoint for {job.wanted.to}"
    largest = job.sample.compare(lambda rows: scores_of(folds, again, rows, average), what)
    layers = ", ".join(layer for f in folds for layer in (*f.copies, f.layer))
    found = {"layer": layers, "background": "first" if folds[0].columns[-1] == 0 else "last"}
    more = {"entry": [checkpoint.entry], "unchanged": checkpoint.copies, "left_out": checkpoint.unwritten()}
    found |= {name: ", ".join(entries) for name, entries in more.items() if any(entries)}
    return found | {"largest_difference": largest}


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
    scale = 1.0 if job.artifact.info.detector.get("activation") == "sigmoid" else scale_for(job.sample.scores)
    logits = CalibratedLogits(job.artifact, scale)
    framework = job.cache.manifest.detector.source.partition(":")[0]
    module: nn.Module = logits
    replaces = LAYERS.get(framework, "")
    if job.wanted.to == "module":
        agnostic = job.cache.manifest.detector.class_agnostic
        module = Predictor(logits, job.cache.classifier, class_agnostic=agnostic)
        replaces = "roi_heads.box_predictor" + (".forward" if framework == "detectron2" else "")
    with replacing(job.out) as temporary:
        graph.write_program(module, job.width, temporary)
        program = graph.read_program(temporary)

        def scores(rows: Tensor) -> Tensor:
            found = program(rows)
            return logits.scores(found[0] if job.wanted.to == "module" else found)

        largest = job.sample.compare(scores, f"the {job.wanted.to}")
    found = (
        {"input": job.artifact.head.inputs, "replaces": replaces} if replaces else {"input": job.artifact.head.inputs}
    )
    return found | {"scale": scale, "largest_difference": largest}


def _triton(job: _Job) -> dict[str, Any]:
    name, model = triton.place(job.out, job.folder, job.wanted.name, overwrite=job.wanted.overwrite)
    with TemporaryDirectory() as scratch:  # an export that is refused leaves no folders
        checked = Path(scratch) / model.name
        largest = _write_graph(job, graph.Scores(job.artifact.head), checked)
        write_text(model.parent.parent / "config.pbtxt", triton.config(name, job.artifact))
        with replacing(model) as temporary:
            shutil.copyfile(checked, temporary)
    return {"model": name, "version": model.parent.name} | _interface(job) | {"largest_difference": largest}
