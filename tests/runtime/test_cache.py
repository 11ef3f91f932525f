# SPDX-License-Identifier: Apache-2.0
"""The user's cache: folder and files of the user's own, which no other can write to; no other decides, and no call fails."""

import json
import os
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

from mpkernels import __main__ as command
from mpkernels.runtime import cache, proof, tuned_table
from mpkernels.tune import problems_of, tune_problems

CPU = torch.device("cpu")
ENTRY = {"fprop 4 4 4 0 float32 float32 float32": {"backend": "native"}}


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Where the cache will be, with a table and a verdict in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuned_table, "PACKAGED", tmp_path / "packaged")
    assert cache.untrusted_reason() is None, "what is not there yet can be made"
    assert tuned_table.save(tuned_table.own_file(CPU), CPU, ENTRY)
    assert cache.update(cache.folder() / proof.FILE, {"place": None})
    monkeypatch.setattr(cache, "_warned", set())
    return cache.folder()


def said(read) -> list[str]:
    """What reading twice warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read()
        read()
    return [str(one.message) for one in caught]


def check_refused(folder, reason) -> None:
    """Nothing is read or written, and the reason names the folder."""
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert cache.untrusted_reason() == reason
    assert said(lambda: cache.read(folder / proof.FILE)) == [f"mpkernels ignores its cache: {reason}"]
    assert cache.read(folder / proof.FILE) == {}
    assert tuned_table.entries(CPU) == {}
    assert not cache.update(folder / proof.FILE, {"place": "wrong"})
    assert not tuned_table.save(tuned_table.own_file(CPU), CPU, ENTRY)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert command.versions()["cache"] == reason


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077], ids=oct)
def test_cache_is_made_for_the_user_alone(umask, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    before = os.umask(umask)
    try:
        assert cache.update(cache.folder() / proof.FILE, {"place": None})
    finally:
        os.umask(before)
    assert cache.folder().stat().st_mode & 0o777 == 0o700
    assert (cache.folder() / proof.FILE).stat().st_mode & 0o777 == 0o600
    assert cache.read(cache.folder() / proof.FILE) == {"place": None}
    assert command.versions()["cache"] == str(cache.folder())


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o702, 0o1777], ids=oct)
def test_cache_that_others_can_write_to_is_refused(mode, folder):
    folder.chmod(mode)
    check_refused(folder, f"{folder} can be written by others: chmod 700 {folder}")
    folder.chmod(0o755)  # reading does no harm
    assert cache.read(folder / proof.FILE) == {"place": None}


def test_cache_of_another_user_is_refused(folder, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    check_refused(folder, f"{folder} belongs to another user: set XDG_CACHE_HOME to a folder of your own")


def test_cache_that_another_user_makes_in_between_is_refused(folder, monkeypatch):
    """Between the first look at the folder and its making."""
    reasons = iter([None, "another user's"])
    with monkeypatch.context() as patch:
        patch.setattr(cache, "untrusted_reason", lambda: next(reasons))
        assert not cache.update(folder / proof.FILE, {"place": "x"})
    assert cache.read(folder / proof.FILE) == {"place": None}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a link away")
def test_cache_behind_another_users_link_is_refused(folder):
    """As where XDG_CACHE_HOME is /tmp."""
    mine = folder.rename(folder.with_name("mine"))
    folder.symlink_to(mine)
    assert cache.untrusted_reason() is None
    os.chown(folder, 1234, -1, follow_symlinks=False)
    check_refused(folder, f"{folder} belongs to another user: set XDG_CACHE_HOME to a folder of your own")


@pytest.mark.parametrize("home", ["", "relative"])
def test_cache_without_a_home_is_none(home, monkeypatch, tmp_path):
    """Nothing is read from, or made in, the folder that a process happens to run in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert cache.untrusted_reason() == "there is no home folder; set XDG_CACHE_HOME"
    assert not tuned_table.save(tuned_table.own_file(CPU), CPU, ENTRY)
    assert tuned_table.entries(CPU) == {}
    assert not (tmp_path / "~").exists()


# ----- the files ---------------------------------------------------------------


def _fifo(path):
    os.mkfifo(path, 0o600)


def _link(path):
    path.with_name("real").write_text(json.dumps({"place": None}))
    path.with_name("real").chmod(0o600)
    path.symlink_to(path.with_name("real"))


def _dangling_link(path):
    path.symlink_to(path.with_name("nowhere"))


def _device(path):
    path.symlink_to("/dev/zero")


def _huge(path):
    with path.open("wb") as file:
        file.truncate(cache.LARGEST + 1)
    path.chmod(0o600)


def _written(text, mode=0o600):
    def write(path):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        path.chmod(mode)

    return write


NO_OBJECTS = ("", "{", "[]", "3", "null", b"\xff\xfe\x00", "[" * 100_000, '{"a":' * 9999, f'{{"a": {"9" * 5000}}}')
HOSTILE = {
    "fifo": (_fifo, "it is not a regular file"),
    "folder": (os.mkdir, "it is not a regular file"),
    "link": (_link, "it is a symbolic link"),
    "dangling link": (_dangling_link, "it is a symbolic link"),
    "device": (_device, "it is a symbolic link"),
    "huge": (_huge, "it is larger than 4194304 bytes"),
    **{oct(mode): (_written('{"place": null}', mode), "it can be written by others") for mode in (0o666, 0o620, 0o602)},
    **{f"text {i}": (_written(text), "it holds no JSON object") for i, text in enumerate(NO_OBJECTS)},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_cache_ignores_a_file_and_says_so_once(name, folder):
    make, reason = HOSTILE[name]
    path = folder / proof.FILE
    path.unlink()
    make(path)
    assert cache.read(folder / "absent") == {}
    reader = threading.Thread(target=lambda: messages.extend(said(lambda: found.append(cache.read(path)))), daemon=True)
    found, messages = [], []
    reader.start()
    reader.join(10)
    assert not reader.is_alive(), "reading blocks"
    assert found == [{}, {}]
    assert len(messages) == 1
    assert messages[0].startswith(f"mpkernels ignores {path}: {reason}")
    if name != "folder":  # it heals itself
        assert cache.update(path, {"place": None})
        assert path.stat().st_mode & 0o777 == 0o600
        assert not path.is_symlink()
        assert cache.read(path) == {"place": None}
    else:
        assert not cache.update(path, {"place": None})
    assert not [p for p in folder.iterdir() if p.name.startswith(f"{proof.FILE}") and p != path], "nothing is left over"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file away")
def test_cache_ignores_a_file_of_another_user(folder):
    path = folder / proof.FILE
    os.chown(path, 1234, -1)
    assert said(lambda: cache.read(path)) == [
        f"mpkernels ignores {path}: it belongs to another user. Remove it: it is made anew where it is needed."
    ]


def test_cache_never_raises_for_a_file(folder):
    """Not even where warnings are errors."""
    (folder / proof.FILE).write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.read(folder / proof.FILE) == {}


def test_cache_on_a_system_without_owners_and_modes(folder, monkeypatch):
    monkeypatch.delattr(os, "geteuid")
    monkeypatch.setattr(cache, "_OPEN", os.O_RDONLY)
    folder.chmod(0o777)
    (folder / proof.FILE).chmod(0o666)
    assert said(lambda: cache.read(folder / proof.FILE)) == []
    assert cache.read(folder / proof.FILE) == {"place": None}
    assert cache.update(folder / proof.FILE, {"other": None})


def test_cache_reads_what_the_package_has_through_links(tmp_path):
    """Some installers link every file; that may be another user's, as the code may."""
    real = tmp_path / "real.json"
    real.write_text(json.dumps({"machine": {}, "entries": ENTRY}))
    tuned_table.PACKAGED.mkdir()
    tuned_table.packaged_file(CPU).symlink_to(real)
    real.chmod(0o666)
    tuned_table.own_file(CPU).unlink()
    assert said(lambda: tuned_table.entries(CPU)) == []
    assert tuned_table.entries(CPU) == ENTRY


def test_packaged_tables_are_trusted_as_the_code_is(monkeypatch):
    """A shared site-packages may be another user's, or its group's."""
    assert tuned_table.save(tuned_table.packaged_file(CPU), CPU, ENTRY)
    tuned_table.PACKAGED.chmod(0o775)
    cache.folder().chmod(0o777)
    assert tuned_table.entries(CPU) == ENTRY


def test_tune_says_why_it_cannot_write(folder, capsys):
    folder.chmod(0o777)
    tune_problems(problems_of(((8, 16, 24),), CPU), rounds=1)
    assert f"cannot be written: {folder} can be written by others" in capsys.readouterr().err


def test_machine_tells_a_slice_from_its_gpu(monkeypatch):
    properties = SimpleNamespace(name="a GPU", major=9, minor=0, multi_processor_count=16, total_memory=10 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(cache, "_driver", lambda: "580")
    found = cache.machine.__wrapped__(torch.device("cuda", 0))
    assert found.items() >= {"name": "a GPU", "architecture": "sm90", "multiprocessors": "16", "memory": "10240 MB"}.items()


def test_machine_names_the_driver(monkeypatch):
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 07:00:00 UTC 2025\nGCC version: 12.2.0\n"
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    monkeypatch.setattr(cache.Path, "read_text", lambda path: text)
    assert cache._driver() == "580.65.06"
    monkeypatch.setattr(cache.Path, "read_text", lambda path: "")
    assert cache._driver() == "CUDA 13000"
