"""Settings from flags, the environment and a TOML file."""

from pathlib import Path

import pytest

from calib.errors import CalibError, SettingError
from calib.server.serve_settings import ServeSettings, read_settings

from .test_process import command

TOML = """
models = "from-file"
port = 1
max_rows = 5
[pinned]
"a.b" = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "serve.toml"
    path.write_text(TOML)
    return path


def test_flags_come_before_the_environment_and_that_before_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CALIB_SERVE_PORT", "2")
    monkeypatch.setenv("CALIB_SERVE_MODELS", "from-environment")
    monkeypatch.setenv("CALIB_SERVE_API_KEYS", "secret-1, secret-2")
    found = read_settings({"models": "from-flags", "port": None}, file)
    assert (str(found.models), found.port, found.max_rows, found.pinned) == ("from-flags", 2, 5, {"a.b": 3})
    assert [key.get_secret_value() for key in found.api_keys] == ["secret-1", "secret-2"]
    assert "secret" not in repr(found)
    assert read_settings().max_rows == ServeSettings.model_fields["max_rows"].default


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "setting 'models'"),
        ({"models": "m", "max_row": 5}, "unknown setting on the command line 'max_row'. Did you mean 'max_rows'"),
        ({"models": "m", "processes": 0}, "setting 'processes' on the command line"),
        ({"models": "m", "precision": "fp8"}, "setting 'precision'"),
        ({"models": "m", "pinned": "crt=x"}, "setting 'pinned'"),
    ],
)
def test_wrong_settings_are_named_with_their_place(given: dict[str, str], text: str) -> None:
    with pytest.raises(CalibError) as e:
        read_settings(given)
    assert text in str(e.value)


def test_an_unknown_variable_of_the_environment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CALIB_SERVE_MAX_BODY", "5")
    with pytest.raises(CalibError, match=r"in the environment 'max_body'\. Did you mean 'max_body_bytes'"):
        read_settings({"models": "m"})


def test_half_a_certificate(tmp_path: Path) -> None:
    (tmp_path / "c").touch()
    with pytest.raises(SettingError, match="ssl_keyfile"):
        ServeSettings(models=tmp_path, ssl_certfile=tmp_path / "c").check_files()


def test_from_the_command_line(file: Path) -> None:
    for arguments, text in (
        (["--config", str(file), "--set", "max_rows=many"], "setting 'max_rows' on the command line"),
        (["--config", str(file.parent / "absent.toml")], "settings file not found"),
        (["--config", __file__], "not valid TOML"),
        (["--config", str(file), "--set", "max_rows"], "expected key=value"),
        (["--config", str(file)], "model folder not found: from-file"),
        ([], "give --models, or set CALIB_SERVE_MODELS"),
    ):
        result = command(*arguments, CALIB_SERVE_PORT="0")
        assert result.returncode == 2 and text in result.stderr and "Traceback" not in result.stderr, result.stderr
