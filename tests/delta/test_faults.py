"""A tenth of the faults of benchmarks/delta_faults.py, and that its check can fail."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "delta_faults.py"


def test_a_tenth_of_all_faults_is_survived(tmp_path):
    words = [sys.executable, str(SCRIPT), "--smoke", "--seed", "1", "--json", str(tmp_path / "f")]
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((tmp_path / "f").read_text(encoding="utf-8"))
    assert found["failed"] == []
    assert found["faults"]["injected"] == found["faults"]["survived"] > 90
    kills = {word: sum(hit.values()) for word, hit in found["kills"].items()}
    assert kills.pop("anchor") == 10 and sum(kills.values()) == 30
    assert {kind for kind in found["kinds"] if "anchor" in kind} > {
        "an old anchor",
        "an unsigned anchor",
    }


CAUGHT = """
import sys
from pathlib import Path
sys.path.insert(0, {scripts!r})
import delta_faults as faults
place = Path({place!r})
faults.build(place, 0)
w = faults.world(place, 0)
good = w.store("good")
w.check("none", good)
assert not w.failed
far = place / "far_store"
faults.done(faults.device.init, far, place / "far", [w.word])
w.check("another package", far)
(good / "CURRENT").unlink()
(good / "CURRENT.2").unlink()
w.check("no record", good)
w.check("nothing is whole", good, is_lost=True)
lost = faults.lost(w, w.store("lost"), "harmed", spare=False)
w.check("lost", lost, is_lost=True)
w.check("lost and not known to be", lost)
faults.heal(w, lost, "no anchor", w.file(w.release(faults.device.record_of(lost).id)))
w.check("another reason", w.store("again"), faults.End(what="no", hint="no"), "none of the trusted keys")
print(*w.failed, sep="\\n")
"""


def test_its_check_notices_what_must_not_be(tmp_path):
    code = CAUGHT.format(scripts=str(SCRIPT.parent), place=str(tmp_path))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line.partition(":")[0] for line in ran.stdout.splitlines()] == [
        "another package",
        "no record",
        "nothing is whole",
        "lost and not known to be",
        "no anchor",
        "no anchor",
        "another reason",
    ]
    assert "serves neither" in ran.stdout and "is no store" in ran.stdout
