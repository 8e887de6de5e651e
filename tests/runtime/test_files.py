"""Files that are replaced in one step."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvfold.runtime.files import replace_file


def mode(file) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def test_a_new_file_has_the_mode_that_the_umask_gives(tmp_path):
    for mask, wanted in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            replace_file(tmp_path / oct(mask), b"new")
        finally:
            os.umask(before)
        assert (tmp_path / oct(mask)).read_bytes() == b"new"
        assert mode(tmp_path / oct(mask)) == wanted


def test_a_file_that_exists_keeps_its_mode(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"old")
    file.chmod(0o640)
    replace_file(file, b"new")
    assert file.read_bytes() == b"new"
    assert mode(file) == 0o640
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_is_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    file, link = tmp_path / "folder/file", tmp_path / "link"
    file.write_bytes(b"old")
    link.symlink_to("folder/file")
    replace_file(link, b"new")
    assert link.is_symlink()
    assert file.read_bytes() == b"new"
    assert list((tmp_path / "folder").iterdir()) == [file]


def test_a_read_only_file_is_refused_and_stays(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"old")
    file.chmod(0o444)
    with pytest.raises(PermissionError, match="read-only file"):
        replace_file(file, b"new")
    assert file.read_bytes() == b"old"
    assert mode(file) == 0o444
    assert list(tmp_path.iterdir()) == [file]


def test_an_error_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(b"old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        replace_file(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        replace_file(tmp_path / "gone/file", b"new")
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_replaced_when_the_new_contents_are_complete(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(b"old")
    replace, seen = os.replace, []

    def observed(new, old):
        seen.append((Path(new).read_bytes(), Path(new).parent, Path(old).read_bytes()))
        replace(new, old)

    monkeypatch.setattr(os, "replace", observed)
    replace_file(file, b"new" * 100_000)
    assert seen == [(b"new" * 100_000, tmp_path, b"old")]
    assert file.read_bytes() == b"new" * 100_000


def test_several_writers_leave_the_contents_of_one(tmp_path):
    file = tmp_path / "file"
    contents = [bytes([n]) * 200_000 for n in range(4)]
    with ThreadPoolExecutor(8) as writers:
        list(writers.map(replace_file, [file] * 40, contents * 10))
    assert file.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [file]
