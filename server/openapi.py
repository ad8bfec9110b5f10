"""What ``/openapi.json`` says of bodies that handlers read themselves."""

from typing import Any

from .exchange import HEADER_LENGTH
from .formats import arrow
from .formats.schemas import RescoreRequest

_BINARY = {"schema": {"type": "string", "format": "binary"}}


def _optional(schema: dict[str, Any]) -> dict[str, Any]:
    """A field that may be left out, or null, which counts as left out."""
    return schema | {"type": [schema["type"], "null"]}


_PARAMETERS = _optional({"type": "object"})
_TENSOR = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"type": "string"},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 2},
        "datatype": {"type": "string", "enum": ["FP32", "FP16", "BF16", "INT32"]},
        "parameters": _PARAMETERS,
        "data": _optional({"type": "array", "items": {}}),
    },
}
_OUTPUT = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string"}, "parameters": _PARAMETERS},
}
_REQUEST = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": _optional({"type": "string"}),
        "inputs": {"type": "array", "items": _TENSOR},
        "outputs": _optional({"type": "array", "items": _OUTPUT}),
        "parameters": _PARAMETERS,
    },
}
_REPLY = {
    "type": "object",
    "required": ["model_name", "model_version", "outputs"],
    "properties": {
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "id": {"type": "string"},
        "outputs": {"type": "array", "items": _TENSOR},
    },
}


def _operation(request: dict[str, Any], reply: dict[str, Any], description: str) -> dict[str, Any]:
    answered = {"description": "what was asked for", "content": reply}
    body = {"required": True, "description": description, "content": request}
    return {"requestBody": body, "responses": {"200": answered}}


INFER = _operation(
    {"application/json": {"schema": _REQUEST}, "application/octet-stream": _BINARY},
    {"application/json": {"schema": _REPLY}, "application/octet-stream": _BINARY},
    f"JSON, and behind it the binary inputs; {HEADER_LENGTH} is then the length of the JSON.",
)
RESCORE = _operation(
    {"application/json": {"schema": RescoreRequest.model_json_schema()}, arrow.MEDIA_TYPE: _BINARY},
    {"application/json": {"schema": {"$ref": "#/components/schemas/RescoreReply"}}, arrow.MEDIA_TYPE: _BINARY},
    "Proposals of one image as JSON, or of several as an Arrow IPC stream.",
)
_ASKED = {"type": "object", "properties": {"parameters": _PARAMETERS}}
LOAD = {"requestBody": {"required": False, "content": {"application/json": {"schema": _ASKED}}}}
INDEX_OBJECT = {"type": "object", "properties": {"ready": _optional({"type": "boolean"})}}
INDEX = {"requestBody": {"required": False, "content": {"application/json": {"schema": INDEX_OBJECT}}}}
