"""A client of the service: NumPy in, NumPy out, over the Open Inference Protocol with binary tensors.

``Client`` waits, ``AsyncClient`` is awaited; both need httpx (extra ``client``). Letters:
N proposals, D feature size, C foreground classes, K detections.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self
from urllib.parse import quote

import numpy as np
from numpy.typing import ArrayLike, NDArray

from calib.errors import CalibError, MissingExtraError, ShapeError

try:
    import httpx
except ImportError:
    raise MissingExtraError("httpx", "client") from None

Arrays = dict[str, NDArray[Any]]
_DTYPES: dict[str, Any] = {"FP32": np.float32, "FP16": np.float16, "INT32": np.int32}
_LENGTH = "Inference-Header-Content-Length"


class ServiceError(CalibError):
    """The service refused a request, or could not be reached; ``code`` is its HTTP status, 0 without an answer."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Found:
    """Detections of one image, best first."""

    box: NDArray[np.float32]  # [K, 4] x1, y1, x2, y2
    score: NDArray[np.float32]  # [K]
    category: NDArray[np.int32]  # [K] class index; metadata lists category ids
    row: NDArray[np.int32]  # [K] proposal of the request


@dataclass(frozen=True)
class _Call:
    method: str
    path: str
    content: bytes = b""
    headers: Mapping[str, str] | None = None


def _model_path(model: str, version: int | None, tail: str) -> str:
    if set(model) <= {"."}:  # a path's dots would be tidied away
        raise ServiceError(f"'{model}' is no name of a model")
    at = "" if version is None else f"/versions/{version}"
    return f"/v2/models/{quote(model, safe='')}{at}{tail}"


def _infer(
    model: str,
    version: int | None,
    inputs: Mapping[str, NDArray[Any]],
    outputs: Sequence[str],
    parameters: Mapping[str, Any],
) -> _Call:
    names = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
    entries, blobs = [], []
    for name, array in inputs.items():
        blob = np.ascontiguousarray(array).tobytes()
        described = {"name": name, "datatype": names[array.dtype], "shape": list(array.shape)}
        entries.append(described | {"parameters": {"binary_data_size": len(blob)}})
        blobs.append(blob)
    wanted = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    try:
        header = json.dumps(
            {"inputs": entries, "outputs": wanted, "parameters": dict(parameters)}, allow_nan=False
        ).encode()
    except ValueError:
        raise ServiceError(f"thresholds must be finite numbers: {dict(parameters)}") from None
    headers = {_LENGTH: str(len(header)), "Content-Type": "application/octet-stream"}
    return _Call("POST", _model_path(model, version, "/infer"), header + b"".join(blobs), headers)


def _arrays(response: httpx.Response) -> Arrays:
    """Outputs by name."""
    _check(response)
    length = int(response.headers[_LENGTH])
    header = json.loads(response.content[:length])
    arrays, at = {}, length
    for output in header["outputs"]:
        size = output["parameters"]["binary_data_size"]
        array = np.frombuffer(response.content, _DTYPES[output["datatype"]], offset=at, count=size // _width(output))
        arrays[output["name"]] = array.reshape(output["shape"])
        at += size
    return arrays


def _width(output: Mapping[str, Any]) -> int:
    return int(np.dtype(_DTYPES[output["datatype"]]).itemsize)


def _check(response: httpx.Response) -> None:
    if response.status_code == 200:
        return
    try:
        text = str(response.json()["error"])
    except (ValueError, KeyError, TypeError):
        text = response.text[:200] or "no reason given"
    raise ServiceError(text, response.status_code)


def _json(response: httpx.Response) -> Any:
    _check(response)
    return response.json()


def _floats(array: ArrayLike, name: str) -> NDArray[Any]:
    """[N, width] as float32, or as float16 if it is that."""
    try:
        matrix = np.asarray(array)
        matrix = matrix if matrix.dtype == np.float16 and name != "BOXES" else matrix.astype(np.float32)
    except (ValueError, TypeError) as e:
        raise ShapeError(f"{name} is no matrix of numbers: {e}") from None
    if matrix.ndim != 2:
        raise ShapeError(f"{name} has shape {list(matrix.shape)}: expected two dimensions")
    return matrix


def _scores_call(model: str, features: ArrayLike, logits: ArrayLike | None, version: int | None, half: bool) -> _Call:
    inputs = {"FEATURES": _floats(features, "FEATURES")}
    if logits is not None:
        inputs["LOGITS"] = _floats(logits, "LOGITS")
    return _infer(model, version, inputs, ["SCORES"], {"score_dtype": "FP16" if half else "FP32"})


def _detect_call(
    model: str,
    features: ArrayLike,
    boxes: ArrayLike,
    logits: ArrayLike | None,
    image_sizes: Sequence[int] | None,
    version: int | None,
    parameters: Mapping[str, float | int | None],
) -> _Call:
    inputs = {"FEATURES": _floats(features, "FEATURES"), "BOXES": _floats(boxes, "BOXES")}
    if logits is not None:
        inputs["LOGITS"] = _floats(logits, "LOGITS")
    if image_sizes is not None:
        sizes = np.asarray(image_sizes)
        if sizes.size and (sizes.dtype.kind not in "iu" or sizes.min() < 0 or sizes.max() >= 2**31):
            raise ShapeError("image_sizes must be whole numbers of rows")
        inputs["IMAGE_SIZES"] = sizes.astype(np.int32)
    outputs = [f"DET_{part}" for part in ("BOXES", "SCORES", "CLASSES", "ROWS", "OFFSETS")]
    # NumPy's own numbers are no JSON.
    plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in parameters.items() if v is not None}
    return _infer(model, version, inputs, outputs, plain)


def _detections(response: httpx.Response) -> list[Found]:
    found = _arrays(response)
    edges = found["DET_OFFSETS"]
    columns = [found[f"DET_{part}"] for part in ("BOXES", "SCORES", "CLASSES", "ROWS")]
    return [Found(*(column[a:b] for column in columns)) for a, b in pairwise(edges)]


def _settings(url: str, api_key: str | None, timeout: float, options: dict[str, Any]) -> dict[str, Any]:
    headers = httpx.Headers(options.pop("headers", None))
    if api_key is not None:
        key = api_key.strip()  # files end with a line
        if not key or not key.isprintable():
            raise ServiceError("the api_key is empty or holds characters that no header can carry")
        headers["Authorization"] = f"Bearer {key}"
    try:
        return {"base_url": httpx.URL(url), "timeout": timeout, "headers": headers, **options}
    except httpx.InvalidURL as e:
        raise ServiceError(f"'{url}' is no address: {e}") from None


def _is_ready(response: httpx.Response) -> bool:
    if response.status_code == 503:
        return False
    _check(response)
    return True


class Client:
    """Talks to ``calib serve`` at ``url``, for example ``http://127.0.0.1:8000``. Use it in a ``with`` statement.

    Every call raises ServiceError for what the service refuses, with its reason.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 60.0, **options: Any) -> None:
        """``options`` go to httpx (``verify``, ``cert``, ``headers``, ...); ``timeout`` is in seconds."""
        self._http = httpx.Client(**_settings(url, api_key, timeout, options))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def _send(self, call: _Call) -> httpx.Response:
        try:
            return self._http.request(call.method, call.path, content=call.content, headers=call.headers)
        except httpx.HTTPError as e:
            raise ServiceError(f"the service cannot be reached: {e}") from e

    def ready(self) -> bool:
        """Whether at least one model is loaded."""
        return _is_ready(self._send(_Call("GET", "/v2/health/ready")))

    def index(self) -> list[dict[str, str]]:
        """Name, version, state and reason of everything in the model folder."""
        found: list[dict[str, str]] = _json(self._send(_Call("POST", "/v2/repository/index")))
        return found

    def metadata(self, model: str, version: int | None = None) -> dict[str, Any]:
        """Inputs, outputs, and under ``parameters`` category ids, names and the detector's thresholds."""
        found: dict[str, Any] = _json(self._send(_Call("GET", _model_path(model, version, ""))))
        return found

    def scores(
        self,
        model: str,
        features: ArrayLike,
        *,
        logits: ArrayLike | None = None,
        version: int | None = None,
        half: bool = False,
    ) -> NDArray[Any]:
        """[N, D] (, [N, C+1]) -> [N, C] float32, or float16 if ``half``; float16 features travel as they are."""
        return _arrays(self._send(_scores_call(model, features, logits, version, half)))["SCORES"]

    def detect(
        self,
        model: str,
        features: ArrayLike,
        boxes: ArrayLike,
        *,
        logits: ArrayLike | None = None,
        image_sizes: Sequence[int] | None = None,
        version: int | None = None,
        score_threshold: float | None = None,
        nms_iou: float | None = None,
        max_detections: int | None = None,
    ) -> list[Found]:
        """Detections of every image after NMS: [N, D], [N, 4] or [N, 4 C], rows per image -> a list of images.

        Thresholds that are not given are the detector's own.
        """
        asked = {"score_threshold": score_threshold, "nms_iou": nms_iou, "max_detections": max_detections}
        return _detections(self._send(_detect_call(model, features, boxes, logits, image_sizes, version, asked)))


class AsyncClient:
    """``Client`` for asyncio: the same calls, awaited, in an ``async with`` statement."""

    def __init__(self, url: str, *, api_key: str | None = None, timeout: float = 60.0, **options: Any) -> None:
        """As ``Client``."""
        self._http = httpx.AsyncClient(**_settings(url, api_key, timeout, options))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def _send(self, call: _Call) -> httpx.Response:
        try:
            return await self._http.request(call.method, call.path, content=call.content, headers=call.headers)
        except httpx.HTTPError as e:
            raise ServiceError(f"the service cannot be reached: {e}") from e

    async def ready(self) -> bool:
        """As ``Client.ready``."""
        return _is_ready(await self._send(_Call("GET", "/v2/health/ready")))

    async def index(self) -> list[dict[str, str]]:
        """As ``Client.index``."""
        found: list[dict[str, str]] = _json(await self._send(_Call("POST", "/v2/repository/index")))
        return found

    async def metadata(self, model: str, version: int | None = None) -> dict[str, Any]:
        """As ``Client.metadata``."""
        found: dict[str, Any] = _json(await self._send(_Call("GET", _model_path(model, version, ""))))
        return found

    async def scores(
        self,
        model: str,
        features: ArrayLike,
        *,
        logits: ArrayLike | None = None,
        version: int | None = None,
        half: bool = False,
    ) -> NDArray[Any]:
        """As ``Client.scores``."""
        return _arrays(await self._send(_scores_call(model, features, logits, version, half)))["SCORES"]

    async def detect(
        self,
        model: str,
        features: ArrayLike,
        boxes: ArrayLike,
        *,
        logits: ArrayLike | None = None,
        image_sizes: Sequence[int] | None = None,
        version: int | None = None,
        score_threshold: float | None = None,
        nms_iou: float | None = None,
        max_detections: int | None = None,
    ) -> list[Found]:
        """As ``Client.detect``."""
        asked = {"score_threshold": score_threshold, "nms_iou": nms_iou, "max_detections": max_detections}
        call = _detect_call(model, features, boxes, logits, image_sizes, version, asked)
        return _detections(await self._send(call))
