"""Files that are whole or not there, and that never fall on somebody else's."""

import os
import subprocess
import sys
import threading

import pytest

from nanogpt_jax.host import files


def test_a_file_is_the_old_one_or_the_new_one_and_keeps_its_mode(tmp_path):
    path = tmp_path / "figures.json"
    files.write(path, "old")
    path.chmod(0o640)

    def interrupted():
        with files.replacing(path) as beside:
            beside.write_text("half of the n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert path.read_text() == "old"
    files.write(path, b"new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["figures.json"]


def test_a_full_disk_leaves_nothing_begun(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write(tmp_path / "new", "text")
    assert list(tmp_path.iterdir()) == []


def test_no_link_is_written_through(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    place = tmp_path / "place"
    place.symlink_to(precious)
    files.write(place, "theirs")
    assert precious.read_text() == "mine"
    assert not place.is_symlink()


def test_a_result_leaves_links_devices_and_pipes_what_they_are(tmp_path):
    real, link, dangling = tmp_path / "real", tmp_path / "link", tmp_path / "dangling"
    real.write_text("before")
    link.symlink_to(real)
    dangling.symlink_to(tmp_path / "later")
    files.write_result(link, "after")
    files.write_result(dangling, "there")
    assert (real.read_text(), link.is_symlink()) == ("after", True)
    assert ((tmp_path / "later").read_text(), dangling.is_symlink()) == ("there", True)

    pipe, heard = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: heard.append(pipe.read_text()))
    reader.start()
    files.write_result(pipe, "through")
    reader.join(10)
    assert heard == ["through"]
    assert pipe.is_fifo()
    files.write_result(files.Path("/dev/null"), "gone")
    assert files.is_special(files.Path("/dev/null"))


def test_what_cannot_be_written_is_found_before_the_work(tmp_path):
    files.check_writable(tmp_path / "new")
    files.check_writable(files.Path("/dev/null"))
    assert list(tmp_path.iterdir()) == []
    for place in (tmp_path / "no" / "folder", tmp_path):
        with pytest.raises(OSError):
            files.check_writable(place)


def test_only_what_a_killed_writer_left_is_removed(tmp_path):
    """A live writer's file stays, and so do those of other names and of other shapes."""
    killed = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, sys; from pathlib import Path; from nanogpt_jax.host import files\n"
            "with files.replacing(Path(sys.argv[1])) as f, files.folder_beside(Path(sys.argv[1])) as d:\n"
            "    (d / 'x').write_text('x'); os.kill(os.getpid(), 9)",
            str(tmp_path / "run"),
        ],
    )
    assert killed.returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    others = [".run.tmp", ".run.0123.tmp", ".other.0123456789ab.tmp", "run.0123456789ab.tmp"]
    for name in others:
        (tmp_path / name).write_text("somebody's")
    with files.folder_beside(tmp_path / "run") as alive:
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, alive.name])
        files.write(tmp_path / "run", "text")
        assert alive.is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "run"])
    files.remove_all_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({*others, "run"} - {".other.0123456789ab.tmp"})


def test_a_leftover_that_is_a_link_is_left_alone(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "x").write_text("x")
    link = tmp_path / ".run.0123456789ab.tmp"
    link.symlink_to(precious)
    files.remove_all_leftovers(tmp_path)
    assert link.is_symlink()
    assert (precious / "x").exists()


def test_the_longest_name_has_a_name_beside_it(tmp_path):
    files.write(tmp_path / ("é" * 127), "text")
    assert (tmp_path / ("é" * 127)).read_text() == "text"
