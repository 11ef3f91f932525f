# SPDX-License-Identifier: Apache-2.0
"""The user's cache is a folder of the user's own, which nobody else can write to; any other is left alone, with a reason."""

import os

import pytest
import torch

from mpkernels import __main__ as command
from mpkernels import _cache, _self_check, _table
from mpkernels.tune import problems_of, tune_problems

CPU = torch.device("cpu")
ENTRY = {"fprop 4 4 4 0 float32 float32 float32": {"backend": "native"}}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Where the cache will be, with a table and a verdict in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_table, "PACKAGED", tmp_path / "packaged")
    assert _cache.refusal() is None, "what is not there yet can be made"
    assert _table.save(_table.own_file(CPU), CPU, ENTRY)
    assert _cache.update(_cache.folder() / _self_check.FILE, {"place": None})
    return _cache.folder()


def check_refused(folder, reason) -> None:
    """Nothing is read or written, and the reason names the folder."""
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert _cache.refusal() == reason
    assert _cache.read(folder / _self_check.FILE) == {}
    assert _table.entries(CPU) == {}
    assert not _cache.update(folder / _self_check.FILE, {"place": "wrong"})
    assert not _table.save(_table.own_file(CPU), CPU, ENTRY)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert command.versions()["cache"] == reason


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077], ids=oct)
def test_cache_is_made_for_the_user_alone(umask, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    before = os.umask(umask)
    try:
        assert _cache.update(_cache.folder() / _self_check.FILE, {"place": None})
    finally:
        os.umask(before)
    assert _cache.folder().stat().st_mode & 0o777 == 0o700
    assert (_cache.folder() / _self_check.FILE).stat().st_mode & 0o777 == 0o600
    assert _cache.read(_cache.folder() / _self_check.FILE) == {"place": None}
    assert command.versions()["cache"] == str(_cache.folder())


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702, 0o1777], ids=oct)
def test_cache_that_others_can_write_to_is_refused(mode, folder):
    folder.chmod(mode)
    check_refused(folder, f"{folder} can be written by others: chmod 700 {folder}")
    folder.chmod(0o755)  # reading does no harm
    assert _cache.read(folder / _self_check.FILE) == {"place": None}


def test_cache_of_another_user_is_refused(folder, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    check_refused(folder, f"{folder} belongs to another user")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a link away")
def test_cache_behind_another_users_link_is_refused(folder):
    """As where XDG_CACHE_HOME is /tmp."""
    mine = folder.rename(folder.with_name("mine"))
    folder.symlink_to(mine)
    assert _cache.refusal() is None
    os.chown(folder, 1234, -1, follow_symlinks=False)
    check_refused(folder, f"{folder} belongs to another user")


def test_packaged_tables_are_trusted_as_the_code_is(monkeypatch):
    """A shared site-packages may be another user's, or its group's."""
    assert _table.save(_table.packaged_file(CPU), CPU, ENTRY)
    _table.PACKAGED.chmod(0o775)
    _cache.folder().chmod(0o777)
    assert _table.entries(CPU) == ENTRY


def test_tune_says_why_it_cannot_write(folder, capsys):
    folder.chmod(0o777)
    tune_problems(problems_of(((8, 16, 24),), CPU), rounds=1)
    assert f"cannot be written: {folder} can be written by others" in capsys.readouterr().err
