"""Half precision by torch's instructions is NumPy's, bit for bit."""

import numpy as np
import pytest

from calib.cache.convert import all_finite, to_dtype, to_float32

HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16)


def test_every_half_becomes_the_float_that_numpy_makes_of_it() -> None:
    finite = HALVES[np.isfinite(HALVES)]
    assert to_float32(finite).tobytes() == finite.astype(np.float32).tobytes()
    out = np.empty(len(finite), np.float32)
    assert to_float32(finite, out=out) is out and out.tobytes() == finite.astype(np.float32).tobytes()
    assert np.isnan(to_float32(HALVES[np.isnan(HALVES)])).all()


def test_every_float_is_rounded_as_numpy_rounds_it() -> None:
    """All halves, the points half way between neighbours and just beside them, tiny and huge numbers."""
    finite = np.sort(HALVES[np.isfinite(HALVES)].astype(np.float32))
    middle = (finite[1:] + finite[:-1]) / 2
    rng = np.random.default_rng(0)
    random = rng.integers(0, 2**32, 100_000, np.uint32).view(np.float32)
    edges = np.asarray([0.0, -0.0, 65519.996, 65520.0, -65520.0, 1e-8, 1e-45, np.inf, -np.inf], np.float32)
    around = [np.nextafter(middle, np.float32(s)) for s in (-np.inf, np.inf)]
    x = np.concatenate([finite, middle, *around, random[~np.isnan(random)], edges]).astype(np.float32)
    with np.errstate(over="ignore"):
        assert to_dtype(x, "float16").tobytes() == x.astype(np.float16).tobytes()
    assert to_dtype(x, "float32") is x


def test_arrays_that_torch_would_not_take() -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    x.setflags(write=False)
    assert np.array_equal(to_dtype(x[:, ::-2], "float16"), x[:, ::-2])
    half = np.broadcast_to(np.float16(3), (2, 2))
    assert np.array_equal(to_float32(half), [[3, 3], [3, 3]])
    assert to_float32(np.empty((0, 4), np.float16)).shape == (0, 4) == to_dtype(x[:0], "float16").shape


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_numbers_that_are_not_finite_are_seen(dtype: str) -> None:
    x = np.zeros((5, 7), dtype)
    x[2, 2], x[3, 3] = np.finfo(dtype).max, -np.finfo(dtype).max
    assert all_finite(x) and all_finite(x[:0])
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        x[4, 6] = bad
        assert not all_finite(x) and all_finite(x[:4])
