"""A Triton model repository: ``NAME/config.pbtxt`` and ``NAME/VERSION/model.onnx`` for its ONNX Runtime backend."""

import json
from pathlib import Path

from calib.artifact import Artifact
from calib.errors import ExistsError, SettingError
from calib.export.graph import INPUT, OUTPUT

CONFIG = """\
name: {name}
backend: "onnxruntime"
max_batch_size: 0
input [
  {{
    name: "{input}"
    data_type: TYPE_FP32
    dims: [ -1, {width} ]
  }}
]
output [
  {{
    name: "{output}"
    data_type: TYPE_FP32
    dims: [ -1, {classes} ]
  }}
]
parameters {{
  key: "category_ids"
  value {{ string_value: {ids} }}
}}
parameters {{
  key: "method"
  value {{ string_value: {method} }}
}}
"""


def config(name: str, artifact: Artifact) -> str:
    """The text of ``config.pbtxt``; rows are a free dimension, so that Triton itself batches nothing."""
    head, info = artifact.head, artifact.info
    return CONFIG.format(
        name=json.dumps(name),
        input=INPUT,
        output=OUTPUT,
        width=head.feature_size,
        classes=head.num_classes,
        ids=json.dumps(json.dumps(info.category_ids)),
        method=json.dumps(info.method),
    )


def place(repository: Path, head_folder: Path, name: str, *, overwrite: bool) -> tuple[str, Path]:
    """Name and ``model.onnx`` of a head, MODELS/NAME/VERSION, in ``repository``; a version that is no number is 1.

    Raises:
        SettingError: a name that is no folder's. ExistsError: the version is there, and not to be replaced.
    """
    folder = head_folder.resolve()
    name = name or folder.parent.name
    if not name or name.startswith(".") or "/" in name:
        raise SettingError(f"name is '{name}': expected the name of a folder")
    version = folder.name if folder.name.isdecimal() and int(folder.name) > 0 else "1"
    model = repository / name / version / "model.onnx"
    if model.exists() and not overwrite:
        raise ExistsError(f"{model} exists", hint="add --overwrite, or give another --name")
    return name, model
