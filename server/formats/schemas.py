"""JSON of ``POST /v1/rescore`` and of errors, as the OpenAPI document shows it."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import BadRequestError
from ..serve_settings import MAX_ROWS
from .wire import parse_json

# A body of a few MiB can hold millions of wrong elements: the first one is enough for an answer.
Row = Annotated[list[float], Field(fail_fast=True)]
Matrix = Annotated[list[Row], Field(fail_fast=True, max_length=MAX_ROWS)]
Box = Annotated[list[float], Field(fail_fast=True, min_length=4, max_length=4)]
Share = Annotated[float, Field(ge=0, le=1)]


class RescoreOptions(BaseModel):
    """Whom to ask, and thresholds. What is left out is taken from the detector that the head was fitted for."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    model: str = Field(description="name of the model folder")
    version: int | str | None = Field(default=None, description="default: the pinned, or the highest that is loaded")
    score_threshold: Share | None = None
    nms_iou: Share | None = None
    max_detections: Annotated[int, Field(ge=1, le=10_000)] | None = None


class RescoreRequest(RescoreOptions):
    """Proposals of one image."""

    model_config = ConfigDict(strict=True)

    features: Matrix = Field(description="[N, D] what the detector feeds to its classifier")
    boxes: Annotated[list[Box], Field(fail_fast=True, max_length=MAX_ROWS)] = Field(
        description="[N, 4] x1, y1, x2, y2 in pixels"
    )
    logits: Matrix | None = Field(default=None, description="[N, C+1] the detector's own, background last")


class Detection(BaseModel):
    """One detection; ``row`` is the proposal that it came from, ``image`` stands where that column was sent."""

    image: int | None = None
    row: int
    category_id: int
    category_index: int
    category_name: str
    score: float
    box: list[float]


class RescoreReply(BaseModel):
    """Detections, best first."""

    model_name: str
    model_version: str
    detections: list[Detection]


class ErrorReply(BaseModel):
    """The body of every reply that is not a success."""

    error: str


def parse_rescore(body: bytearray) -> RescoreRequest:
    """Read a request.

    Raises:
        BadRequestError: not JSON, or not of this form; the first place that is wrong is named.
    """
    given = parse_json(body)
    unknown = next((key for key in given if key not in RescoreRequest.model_fields), None)
    if unknown is not None:  # found here, since pydantic makes an error of each of them
        raise BadRequestError(f"'{unknown[:64]}' is not known: expected {', '.join(RescoreRequest.model_fields)}")
    try:
        return RescoreRequest.model_validate(given)
    except ValidationError as e:
        raise _first(e) from None


def parse_options(metadata: dict[str, str]) -> RescoreOptions:
    """Read the metadata of an Arrow schema; keys with another purpose ("pandas", "ARROW:...") are left alone.

    Raises:
        BadRequestError: a value that is missing or wrong.
    """
    try:
        return RescoreOptions(**{k: v for k, v in metadata.items() if k in RescoreOptions.model_fields})  # type: ignore[arg-type]
    except ValidationError as e:
        raise _first(e, "metadata ") from None


def _first(error: ValidationError, prefix: str = "") -> BadRequestError:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "the request"
    return BadRequestError(f"{prefix}{place[:128]}: {first['msg'][:256]}", hint="see /docs")
