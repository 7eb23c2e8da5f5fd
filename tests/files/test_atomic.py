"""Files that change in one step: what stays, what is swept, who waits."""

import os
import stat
import threading

import pytest

import flora
from flora._files import atomic
from flora._files.atomic import alone, replace, staged, steadily


def put(path, data=b"new"):
    replace(path, lambda: [data])


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_modes_and_links_stay(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "way").symlink_to("folder")
    target, path = tmp_path / "store" / "blob", tmp_path / "folder" / "x"
    target.write_bytes(b"old")
    path.symlink_to("../store/blob")
    for mode in (0o600, 0o444, 0o664):
        target.chmod(mode)
        put(tmp_path / "way" / "x")
        assert os.readlink(path) == "../store/blob"
        assert (tmp_path / "way").is_symlink()
        assert stat.S_IMODE(target.stat().st_mode) == mode
        assert target.read_bytes() == b"new"
    (tmp_path / "folder" / "y").symlink_to(tmp_path / "later" / "y")  # not yet there
    put(tmp_path / "folder" / "y")
    assert (tmp_path / "later" / "y").read_bytes() == b"new"
    assert names(tmp_path / "store") == ["blob"]
    assert names(tmp_path / "folder") == ["x", "y"]


def test_a_new_file_gets_what_the_umask_leaves(tmp_path, monkeypatch):
    for umask in (0o077, 0o002):
        old = os.umask(umask)
        monkeypatch.setattr(os, "umask", None)  # of all threads: no saver's to change
        put(tmp_path / f"{umask}" / "x")
        monkeypatch.undo()
        os.umask(old)
        folder = tmp_path / f"{umask}"
        modes = [stat.S_IMODE(p.stat().st_mode) for p in (folder, folder / "x")]
        assert modes == [0o777 & ~umask, 0o666 & ~umask]


def test_a_secret_file_is_never_open_to_others(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"old")
    path.chmod(0o600)
    seen = []

    def chunks():
        seen.extend(stat.S_IMODE(p.stat().st_mode) for p in tmp_path.glob(".*"))
        return [b"new"]

    replace(path, chunks)
    assert seen == [0o600]


def test_what_is_no_regular_file_is_left_alone(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(flora.LoraError, match="is no regular file"):
            put(tmp_path / name)
    assert names(tmp_path) == ["folder", "pipe"]


def test_leftovers_of_the_dead_are_swept_and_those_of_the_living_spared(tmp_path):
    dead = tmp_path / ".flora-0123456789abcdef.tmp"
    dead.write_bytes(b"half of it")
    (tmp_path / ".mine.tmp").write_bytes(b"")
    with staged(tmp_path / "x", lambda: [b"slow"]) as slow:
        assert not dead.exists()
        put(tmp_path / "y")
        assert slow.new.exists()
        slow.put()
    assert names(tmp_path) == [".mine.tmp", "x", "y"]
    assert (tmp_path / "x").read_bytes() == b"slow"


def test_a_file_that_is_swept_before_it_is_locked_is_made_again(tmp_path, monkeypatch):
    lock, first = atomic._lock, []

    def late(file, how):
        if not first:
            first.append(file)
            (new,) = tmp_path.glob(".flora-*")
            new.unlink()
        return lock(file, how)

    monkeypatch.setattr(atomic, "_lock", late)
    put(tmp_path / "x")
    assert names(tmp_path) == ["x"]


def test_a_failure_leaves_what_was_there(tmp_path):
    put(tmp_path / "x", b"old")

    def chunks():
        yield b"new"
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        replace(tmp_path / "x", chunks)
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_savers_of_one_folder_wait_for_each_other(tmp_path):
    order = []

    def second():
        with alone(tmp_path):
            order.append("second")

    thread = threading.Thread(target=second)
    with alone(tmp_path):
        thread.start()
        thread.join(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_reader_looks_again_when_a_file_has_changed(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    put(one, b"1")
    put(two, b"1")
    reads = []

    def read():
        found = one.read_bytes()
        if len(reads) < 3:  # a save comes between
            put(one, b"%d" % len(reads))
            put(two, b"%d" % len(reads))
        reads.append(found + two.read_bytes())
        if len(reads) == 2:
            raise flora.LoraError("they do not fit")
        return reads[-1]

    assert steadily((one, two), read) == b"22"
    assert len(reads) == 4


def test_what_is_wrong_with_files_that_stay_is_raised(tmp_path):
    put(tmp_path / "x")
    tries = []

    def read():
        tries.append(1)
        raise flora.LoraError("they do not fit")

    with pytest.raises(flora.LoraError, match="they do not fit"):
        steadily((tmp_path / "x", tmp_path / "none"), read)
    assert len(tries) == 1


def test_a_reader_gives_up(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "_TRIES", 5)
    with pytest.raises(flora.LoraError, match="has changed each of the 5 times"):
        steadily((tmp_path / "x",), lambda: put(tmp_path / "x"))
