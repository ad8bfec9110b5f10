"""An unmodified tritonclient against a live server: what it asks for, it gets, to the last bit."""

import asyncio

import numpy as np
import pytest
import torch
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from .conftest import CLASSES, FEATURE_SIZE, Server

Array = NDArray[np.float32]


def as_input(
    array: NDArray[np.generic], datatype: str, *, name: str = "FEATURES", binary: bool = True
) -> triton.InferInput:
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    return tensor


def expected(server: Server, features: Array, name: str = "linear", version: int = 10) -> Array:
    scores: Array = server.head(name, version).scores(torch.from_numpy(features)).numpy()
    return scores


def test_health_and_metadata(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("linear") and client.is_model_ready("linear", "2")
    assert not client.is_model_ready("linear", "3") and not client.is_model_ready("nothing")
    assert client.get_server_metadata()["name"] == "calib"
    metadata = client.get_model_metadata("linear")
    assert metadata["versions"] == ["1", "2", "10"]
    assert metadata["inputs"][0] == {"name": "FEATURES", "datatype": "FP32", "shape": [-1, FEATURE_SIZE]}
    assert metadata["outputs"][0] == {"name": "SCORES", "datatype": "FP32", "shape": [-1, CLASSES]}
    assert {o["name"]: o["shape"] for o in metadata["outputs"]}["DET_BOXES"] == [-1, 4]
    assert metadata["parameters"]["category_ids"] == [3, 5, 7, 9, 11, 13]
    assert client.get_model_metadata("linear", "2")["parameters"]["version"] == "2"
    config = client.get_model_config("cosine")
    assert config["name"] == "cosine" and config["max_batch_size"] == 0
    assert config["input"][1]["optional"] is True


def test_the_index_tells_what_is_not_served_and_why(client: triton.InferenceServerClient) -> None:
    index = {(row["name"], row["version"]): row for row in client.get_model_repository_index()}
    assert index["linear", "10"] == {"name": "linear", "version": "10", "state": "READY", "reason": ""}
    assert index["partly", "1"]["state"] == "READY"
    assert index["partly", "2"]["state"] == "UNAVAILABLE" and "damaged" in index["partly", "2"]["reason"]
    assert index["partly", "3"]["state"] == "UNAVAILABLE" and "symbolic link" in index["partly", "3"]["reason"]
    assert not any(name == "notes" for name, _ in index)
    assert not client.is_model_ready("partly", "2") and not client.is_model_ready("partly", "3")


@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize(("datatype", "binary_in"), [("FP32", True), ("FP16", True), ("FP32", False)])
def test_scores_are_those_of_the_library(
    client: triton.InferenceServerClient,
    server: Server,
    features: Array,
    datatype: str,
    binary_in: bool,
    binary_out: bool,
) -> None:
    array = features.astype(np.float16) if datatype == "FP16" else features
    output = triton.InferRequestedOutput("SCORES", binary_data=binary_out)
    result = client.infer("linear", [as_input(array, datatype, binary=binary_in)], outputs=[output], request_id="r1")
    np.testing.assert_array_equal(result.as_numpy("SCORES"), expected(server, features))
    response = result.get_response()
    assert (response["model_version"], response["id"]) == ("10", "r1")


def test_bfloat16(client: triton.InferenceServerClient, server: Server, features: Array) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    array = features.astype(ml_dtypes.bfloat16)
    result = client.infer("linear", [as_input(array, "BF16")])
    np.testing.assert_array_equal(result.as_numpy("SCORES"), expected(server, array.astype(np.float32)))


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_compressed_requests(
    client: triton.InferenceServerClient, server: Server, features: Array, compression: str
) -> None:
    result = client.infer(
        "linear",
        [as_input(features, "FP32")],
        request_compression_algorithm=compression,
        response_compression_algorithm=compression,
    )
    np.testing.assert_array_equal(result.as_numpy("SCORES"), expected(server, features))


@pytest.mark.parametrize("version", [1, 2, 10])
def test_versions(client: triton.InferenceServerClient, server: Server, features: Array, version: int) -> None:
    result = client.infer("linear", [as_input(features, "FP32")], model_version=str(version))
    np.testing.assert_array_equal(result.as_numpy("SCORES"), expected(server, features, version=version))


def test_the_default_is_the_highest_version_that_could_be_loaded(
    client: triton.InferenceServerClient, server: Server, features: Array
) -> None:
    result = client.infer("partly", [as_input(features, "FP32")])
    assert result.get_response()["model_version"] == "1"
    np.testing.assert_array_equal(result.as_numpy("SCORES"), expected(server, features, "partly", 1))


@pytest.mark.parametrize("binary", [True, False])
def test_zero_rows(client: triton.InferenceServerClient, binary: bool) -> None:
    nothing = as_input(np.zeros((0, FEATURE_SIZE), np.float32), "FP32", binary=binary)
    output = triton.InferRequestedOutput("SCORES", binary_data=binary)
    assert client.infer("linear", [nothing], outputs=[output]).as_numpy("SCORES").shape == (0, CLASSES)


def test_given_logits_are_used_by_heads_that_take_them(
    client: triton.InferenceServerClient, server: Server, features: Array
) -> None:
    logits = np.random.default_rng(2).standard_normal((len(features), CLASSES + 1)).astype(np.float32)
    inputs = [as_input(logits, "FP32", name="LOGITS"), as_input(features.astype(np.float16), "FP16")]
    scores = client.infer("own-logits", inputs).as_numpy("SCORES")
    head = server.head("own-logits", 1)
    wanted = head.scores(torch.from_numpy(features), torch.from_numpy(logits)).numpy()
    np.testing.assert_array_equal(scores, wanted)
    assert not np.allclose(scores, head.scores(torch.from_numpy(features)).numpy())


def test_async_infer(server: Server, features: Array) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}", concurrency=4) as client:
        versions = ["1", "2", "10", "1"]
        pending = [client.async_infer("linear", [as_input(features, "FP32")], model_version=v) for v in versions]
        for version, request in zip(versions, pending, strict=True):
            scores = request.get_result().as_numpy("SCORES")
            np.testing.assert_array_equal(scores, expected(server, features, version=int(version)))


def test_asyncio_client(server: Server, features: Array) -> None:
    async def ask() -> Array:
        async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            assert await client.is_server_ready()
            results = await asyncio.gather(*(client.infer("linear", [as_input(features, "FP32")]) for _ in range(4)))
            scores: Array = np.stack([r.as_numpy("SCORES") for r in results])
            return scores

    for scores in asyncio.run(ask()):
        np.testing.assert_array_equal(scores, expected(server, features))


def test_statistics_count_rows_and_requests(client: triton.InferenceServerClient, features: Array) -> None:
    def counts() -> tuple[int, int, int]:
        (stats,) = client.get_inference_statistics("cosine")["model_stats"]
        inference = stats["inference_stats"]
        return stats["inference_count"], inference["success"]["count"], inference["fail"]["count"]

    before = counts()
    client.infer("cosine", [as_input(features, "FP32")])
    with pytest.raises(InferenceServerException):
        client.infer("cosine", [as_input(features[:, 1:], "FP32")])
    assert np.subtract(counts(), before).tolist() == [len(features), 1, 1]
    assert {s["name"] for s in client.get_inference_statistics()["model_stats"]} >= {"linear", "cosine"}


def test_what_perf_analyzer_reads_and_asks(client: triton.InferenceServerClient, features: Array) -> None:
    """Counts of a cache that is not there; every output of the metadata, with the inputs that are not optional."""
    (stats,) = client.get_inference_statistics("linear", "10")["model_stats"]
    for name in ("cache_hit", "cache_miss"):
        assert stats["inference_stats"][name] == {"count": 0, "ns": 0}
    metadata, config = client.get_model_metadata("linear"), client.get_model_config("linear")
    (needed,) = (i["name"] for i in config["input"] if not i.get("optional"))
    outputs = [triton.InferRequestedOutput(o["name"]) for o in metadata["outputs"]]
    result = client.infer("linear", [as_input(features, "FP32", name=needed)], outputs=outputs)
    found = [o["name"] for o in result.get_response()["outputs"]]
    assert found == ["SCORES", "TOP_SCORES", "TOP_ROWS", "TOP_CLASSES", "TOP_OFFSETS"]
    boxes = as_input(np.tile(np.float32([0, 0, 9, 9]), (len(features), 1)), "FP32", name="BOXES")
    result = client.infer("linear", [as_input(features, "FP32"), boxes], outputs=outputs)
    assert [o["name"] for o in result.get_response()["outputs"]] == [o["name"] for o in metadata["outputs"]]
    with pytest.raises(InferenceServerException, match="detections need"):
        client.infer("linear", [as_input(features, "FP32")], outputs=outputs[1:])


def test_errors_carry_our_text_and_code(client: triton.InferenceServerClient, features: Array) -> None:
    cases = [
        ("nothing", features, {}, "404", "unknown model 'nothing'"),
        ("linear", features, {"model_version": "3"}, "404", "no version '3'"),
        ("partly", features, {"model_version": "2"}, "404", "damaged"),
        ("linear", features[:, 1:], {}, "400", "expected [N, 32]"),
        ("linear", np.full_like(features, np.nan), {}, "400", "NaN"),
        ("linear", np.full_like(features, np.inf), {}, "400", "infinity"),
        ("linear", np.full_like(features, 3e38), {}, "400", "too large"),
        ("linear", np.zeros((20_001, FEATURE_SIZE), np.float32), {}, "400", "20000"),
    ]
    for name, array, options, status, text in cases:
        with pytest.raises(InferenceServerException) as caught:
            client.infer(name, [as_input(array, "FP32")], **options)
        assert caught.value.status() == status and text in caught.value.message(), caught.value
    with pytest.raises(InferenceServerException, match="expected SCORES") as caught:
        client.infer("linear", [as_input(features, "FP32")], outputs=[triton.InferRequestedOutput("BOXES")])
    with pytest.raises(InferenceServerException, match="expected FEATURES, LOGITS") as caught:
        client.infer("linear", [as_input(features, "FP32", name="IMAGE")])


def test_parts_of_triton_that_are_not_here_answer_501(client: triton.InferenceServerClient) -> None:
    calls = (
        client.get_trace_settings,
        client.get_log_settings,
        client.get_system_shared_memory_status,
        client.get_cuda_shared_memory_status,
        client.unregister_system_shared_memory,
    )
    for call in calls:
        with pytest.raises(InferenceServerException) as caught:
            call()
        assert caught.value.status() == "501" and "not offered" in caught.value.message()
