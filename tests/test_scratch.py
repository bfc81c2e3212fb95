"""Directories that vanish with their maker."""

import errno
import os
import signal
import subprocess
import sys

import pytest

from effc import scratch
from effc.errors import PackageError

HOLD = """
import sys, time
from pathlib import Path
from effc import scratch
from effc.errors import PackageError
with scratch.held(Path(sys.argv[1]), "effc-t-") as place:
    (place / "file").write_text("x")
    print(place, flush=True)
    time.sleep(60)
"""


def test_it_is_gone_afterwards(tmp_path):
    with scratch.held(tmp_path, "effc-t-") as place:
        (place / "file").write_text("x")
        assert place.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["take", "_remove"])
def test_a_signal_in_the_midst_of_making_or_removing_leaves_nothing(tmp_path, monkeypatch, part):
    usual = getattr(scratch, part)

    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGINT)
        return usual(*args, **options)

    monkeypatch.setattr(scratch, part, interrupted)
    with pytest.raises(KeyboardInterrupt), scratch.held(tmp_path, "effc-t-") as place:
        assert part == "_remove" and place.exists()
    assert list(tmp_path.iterdir()) == []


def test_it_may_be_renamed_away(tmp_path):
    with scratch.held(tmp_path, "effc-t-") as place:
        (place / "inner").mkdir()
        os.rename(place / "inner", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_place_for_temporary_files_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with (
        pytest.raises(PackageError, match=f"no room for temporary files in {tmp_path}") as caught,
        scratch.held(),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", "file")
    assert "TMPDIR" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_place_of_somebody_else_is_theirs(tmp_path):
    with pytest.raises(OSError, match="No space"), scratch.held(tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device", "file")


def test_one_that_is_held_is_left_alone(tmp_path):
    with scratch.held(tmp_path, "effc-t-") as mine:
        with scratch.held(tmp_path, "effc-t-"):
            pass
        assert mine.is_dir()
        assert scratch.sweep(tmp_path, "effc-t-") == 0


def test_what_a_killed_process_left_goes_with_the_next_one(tmp_path):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True
    )
    place = child.stdout.readline().strip()
    assert scratch.sweep(tmp_path, "effc-t-") == 0
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert os.path.isdir(place)
    (tmp_path / "effc-other").mkdir()
    with scratch.held(tmp_path, "effc-t-"):
        assert not os.path.exists(place)
    assert [p.name for p in tmp_path.iterdir()] == ["effc-other"]


def test_a_link_is_no_directory_of_ours(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "effc-t-link").symlink_to(tmp_path / "target")
    assert scratch.sweep(tmp_path, "effc-t-") == 0
    assert (tmp_path / "target").is_dir()
