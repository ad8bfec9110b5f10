"""Files appear whole or not at all, whoever dies; JSON is read plain or gzipped, and what is wrong is said."""

import gzip
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from calib.errors import ExistsError, FormatError, MissingFileError
from calib.files import read_json, replacing, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "one")
    write_text(tmp_path / "new" / "a.txt", "two")
    assert (tmp_path / "new" / "a.txt").read_text() == "two" and names(tmp_path / "new") == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(error), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("ne")
        raise error
    assert (tmp_path / "a.txt").read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_nothing_but_finite_numbers_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert names(tmp_path) == []


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(ExistsError, match=r"a\.txt is a folder, expected the name of a file"):
        write_text(tmp_path / "a.txt", "x")


def test_a_pipe_or_a_device_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(ExistsError, match=r"pipe is a device, a pipe or a socket: it is not replaced"):
            write_text(tmp_path / name, "x")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and names(tmp_path) == ["link", "pipe"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("folder/a.txt")
    for text in ("one", "two"):  # the first time the link leads to nothing
        write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "a.txt").read_text() == text


def test_what_a_killed_process_left_is_removed_by_the_next_writer(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from calib.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as t:\n    t.write_text('half'); os.kill(os.getpid(), 9)"
    )
    target = tmp_path / "a.txt"
    assert subprocess.run([sys.executable, "-c", code, str(target)]).returncode == -9
    assert len(names(tmp_path)) == 1 and not target.exists()
    others = [f".a.txt.{os.getppid()}.tmp", ".b.txt.1.tmp", ".a.txt.mine.tmp"]  # of a living process, another, no one
    for name in others:
        (tmp_path / name).touch()
    write_text(target, "whole")
    assert names(tmp_path) == sorted([*others, "a.txt"])


def test_json_plain_and_gzipped_by_content(tmp_path: Path) -> None:
    text = json.dumps({"a": [1, 2.5, "é"]}).encode()
    for name, content in (("a.json", text), ("b.json", gzip.compress(text)), ("c.gz", text)):
        (tmp_path / name).write_bytes(content)
        assert read_json(tmp_path / name, "file") == {"a": [1, 2.5, "é"]}


def test_what_is_wrong_with_json_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(MissingFileError, match=f"settings not found: {path}"):
        read_json(path, "settings")
    for content in (b"", b'{"a": 1', b"\xff\xfe", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(FormatError, match=rf"settings {path} is not valid JSON"):
            read_json(path, "settings")
    path.write_bytes(gzip.compress(b'{"a": 1}' * 100)[:-12])
    with pytest.raises(FormatError, match=rf"settings {path} is a damaged gzip file"):
        read_json(path, "settings")
    with pytest.raises(FormatError, match=f"settings {tmp_path} cannot be read"):
        read_json(tmp_path, "settings")
