"""Atomic files that never overwrite somebody else's; streams that end nothing; the environment of JAX."""

import contextlib
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from nanogpt_jax.host import files, messages, progress, runtime, terminal


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
    files.write_result(Path("/dev/null"), "gone")
    assert files.is_special(Path("/dev/null"))


def test_what_cannot_be_written_is_found_before_the_work(tmp_path):
    files.check_writable(tmp_path / "new")
    files.check_writable(Path("/dev/null"))
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


# ---- terminal -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Töne\t静けさ\n", "Töne\t静けさ\n"),
        ("\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"),
        ("\x9b31m\x7f\x00", "\\x9b31m\\x7f\\x00"),
        ("one\r\ntwo\rthree", "one\ntwo\\x0dthree"),
        ("exe\u202egpj.\u2066", "exe\\u202egpj.\\u2066"),
    ],
)
def test_what_a_terminal_would_obey_is_shown(text, shown):
    assert terminal.visible(text) == terminal.visible(shown) == shown


PROGRAM = """import sys
from nanogpt_jax import cli
from nanogpt_jax.host import terminal
def main(_):
    {}
sys.stdin and sys.stdin.readline()
sys.exit(cli.guarded(main, []))"""


def command(body: str, streams: str, **environment: str) -> subprocess.CompletedProcess:
    """A command whose main is `body`, with the shell's redirections."""
    words = ["sh", "-c", f'exec "$0" -c "$1" {streams}', sys.executable, PROGRAM.format(body)]
    return subprocess.run(
        words, stdin=subprocess.DEVNULL, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )


TALK = "print('Töne' * 9000); print('Fehler', file=sys.stderr); return 5"
FULL = "error: cannot write to standard output: No space left on device\n"


@pytest.mark.parametrize(
    ("streams", "environment", "code", "out", "err"),
    [
        ("2>&-", {}, 5, "Töne" * 9000 + "\n", ""),
        (">&-", {}, 5, "", "Fehler\n"),
        ("<&- >&- 2>&-", {}, 5, "", ""),
        ("2> /dev/full", {}, 5, "Töne" * 9000 + "\n", ""),
        ("> /dev/full", {}, 2, "", FULL),
        ("", {"PYTHONIOENCODING": "ascii"}, 5, "T?ne" * 9000 + "\n", "Fehler\n"),
    ],
)
def test_a_stream_that_is_closed_full_or_poor_gives_no_traceback(streams, environment, code, out, err):
    done = command(TALK, streams, **environment)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)


def with_terminal(body: str, watch: bool = True) -> tuple[int, str]:
    """The exit code of such a command on a terminal, and its output; without `watch` the terminal goes away."""
    leader, follower = os.openpty()
    words = [sys.executable, "-c", PROGRAM.format(body)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=follower, stderr=follower)
    os.close(follower)
    if not watch:
        os.close(leader)
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.close()
    seen = b""
    if watch:
        with contextlib.suppress(OSError):  # what reading says on Linux when the other end is closed
            while piece := os.read(leader, 4096):
                seen += piece
        os.close(leader)
    return process.wait(60), seen.decode()


def test_a_terminal_obeys_nobody_but_our_bars():
    body = r"[print(x, end='') for x in ('\x1b[2J', 'a\r', '\nb\n')]; "
    body += r"terminal.unfiltered(sys.stderr).write('\x1b[0m'); print('\r50 %\x1b[A', file=sys.stderr)"
    code, seen = with_terminal(body)
    assert seen == "\\x1b[2Ja\r\nb\r\n\x1b[0m\r50 %\\x1b[A\r\n"
    assert code == 0


@pytest.mark.parametrize(("body", "code"), [(TALK, 141), (f"with terminal.outlived(): {TALK}", 5)])
def test_a_terminal_that_goes_away_ends_a_command_quietly_and_training_not_at_all(body, code):
    assert with_terminal(body, watch=False)[0] == code


@pytest.mark.parametrize("python", [[], ["-u"]])
@pytest.mark.parametrize(("body", "code"), [(TALK, 141), (f"with terminal.outlived(): {TALK}", 5)])
def test_so_does_a_reader(body, code, python):
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, *python, "-c", PROGRAM.format(body)]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.returncode == code
    assert done.stderr == ("Fehler\n" if code == 5 else "")


SHOWN = [("sí no", "sí no"), (7, "7"), ("a ", "'a '"), ("\x1b[2J", "'\\x1b[2J'"), ("ab" * 99, "ab" * 30 + "...")]


@pytest.mark.parametrize(("label", "seen"), SHOWN)
def test_a_label_is_shown_so_that_a_person_sees_what_it_is(label, seen):
    assert messages.printable(label) == seen


# ---- what JAX is told before it starts -------------------------------------------------------------------------------


def test_a_users_own_settings_stand(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "XLA_FLAGS": "--mine"})
    runtime.set_up()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path)
    assert os.environ["XLA_FLAGS"] == "--mine"
    assert os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] == "0.1"
    assert os.environ["TF_CPP_MIN_LOG_LEVEL"] == "2"
    assert "# XLA_FLAGS=--mine" in runtime.describe()


def test_programs_are_kept_in_the_cache_folder_and_not_where_none_can_be(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": str(tmp_path)})
    runtime.set_up()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"].startswith(str(tmp_path / "nanogpt_jax"))
    assert "JAX_ENABLE_COMPILATION_CACHE" not in os.environ
    (tmp_path / "file").touch()
    monkeypatch.setattr(os, "environ", {"XDG_CACHE_HOME": str(tmp_path / "file")})
    runtime.set_up()
    assert os.environ["JAX_ENABLE_COMPILATION_CACHE"] == "false"


CACHED = """
import os, sys
from nanogpt_jax import cli
def main(_):
    import jax, jax.numpy as jnp
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    for n in (1, 2):
        assert jax.jit(lambda x: jnp.sin(x) * n)(jnp.ones(3)).shape == (3,)
    return 0
sys.exit(cli.guarded(main))
"""


def test_damaged_entries_of_the_compile_cache_are_replaced_in_silence(tmp_path, clean_env):
    def run() -> dict[str, bytes]:
        env = {**clean_env, "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
        done = subprocess.run([sys.executable, "-W", "error", "-c", CACHED], env=env, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return {path.name: path.read_bytes() for path in sorted(tmp_path.glob("*-cache"))}

    whole = run()
    (one, first), (two, second), *_ = [(n, c) for n, c in whole.items() if "lambda" in n]
    (tmp_path / one).write_bytes(first[:50])
    (tmp_path / two).write_bytes(second[:40] + bytes(20) + second[60:])
    third = next(name for name in whole if name not in (one, two))
    (tmp_path / third).unlink()  # must be kept again, though a killed process has left entries without a note
    (tmp_path / one.replace("-cache", "-atime")).unlink()
    (tmp_path / "jit_x-0123-cache").write_bytes(b"")
    found = run()
    assert found.keys() == {*whole, "jit_x-0123-cache"}
    assert len(found[one]) > 50
    assert bytes(20) not in found[two]
    assert (tmp_path / "jit_x-0123-atime").exists()
    assert run() == found  # read, and not written anew


def test_a_compile_cache_of_any_size_is_looked_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "1000")
    for i in range(1000):
        (tmp_path / f"jit_f-{i}-cache").touch()
        (tmp_path / f"jit_f-{i}-atime").touch()
    began = time.process_time()
    runtime._complete_cache()
    assert time.process_time() - began < 0.02


def test_items_pass_through_their_progress_which_says_a_line_now_and_then(monkeypatch, capsys):
    clock = itertools.count(step=4.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert list(progress.over("texts\x1b", iter("abcd"), 4)) == ["a", "b", "c", "d"]
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["texts\\x1b 2/4  left 12 s", "texts\\x1b 3/4  left 5 s", "texts\\x1b 4/4  left 0 s"]


def test_a_part_says_the_time_left_for_all_at_its_speed(monkeypatch, capsys):
    clock = itertools.count(step=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with progress.Progress("step", 4, part=progress.Part("member 3 of 9", 6.0)) as bar:
        bar.update(2)
    assert capsys.readouterr().err == "member 3 of 9, step 2/4  left 200 s, 43 min for all\n"  # 26 steps of 100 s


def test_a_link_that_leads_to_itself_is_an_error_and_stays(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for use in (files.check_writable, lambda path: files.write_result(path, "x"), files.target):
        with pytest.raises(OSError, match="symbolic links"):
            use(tmp_path / "loop")
    assert (tmp_path / "loop").is_symlink()
