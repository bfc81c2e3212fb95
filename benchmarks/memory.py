"""Whether calibration takes more memory for more samples: peak of a compile of MiniLM-L6-v2 with 10, 1,000 and 20,000.

    python benchmarks/memory.py                            # writes benchmarks/results/memory-FEATURES.json
    python benchmarks/memory.py --samples 10 1000 --dry    # a few minutes, writes nothing

Sentences are of the words and lengths of examples/minilm/sentences.txt, drawn by a seed, so that they are the same
everywhere and no data set is needed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from pathlib import Path

import common

HELD_OUT = 64
"""Sentences more than are calibrated on, so that verify has its own in every row."""
WITHIN = 0.10
"""What the largest peak may be above the smallest."""


def write_sentences(file: Path, count: int) -> Path:
    """`count` sentences, one a line: the length of a real sentence, words of real sentences."""
    real = [line.split() for line in common.SENTENCES.read_text(encoding="utf-8").splitlines()]
    lengths = [len(words) for words in real if words]
    words = sorted({word for sentence in real for word in sentence})
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            print(*draw.choices(words, k=draw.choice(lengths)), file=stream)
    return file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--samples", type=int, nargs="+", default=[10, 1_000, 20_000])
    parser.add_argument("--dry", action="store_true", help="write no result")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="effc-memory-") as place:
        for count in options.samples:
            file = write_sentences(Path(place) / "sentences.txt", count + HELD_OUT)
            words: list[str | Path] = ["compile", common.minilm(), "--quantize", "int8"]
            words += ["--calib", file, "--samples", str(count), "--no-bench"]
            report = Path(place) / "report.json"
            words += ["-o", Path(place) / str(count), "--json", report]
            seconds, peak = common.run_cli(*words)
            stages = {s["name"]: s for s in json.loads(report.read_text())["stages"]}
            rows.append(
                {
                    "samples": count, "seconds": round(seconds, 1), "peak_mb": round(peak),
                    "calibration_mb": round(stages["quantize"]["peak_mb"]),
                    "calibration_s": round(stages["quantize"]["seconds"], 1),
                }
            )  # fmt: skip
            print(rows[-1], flush=True)
    spread = max(
        max(peaks) / min(peaks) - 1
        for peaks in ([row[name] for row in rows] for name in ("peak_mb", "calibration_mb"))
    )
    print(f"peaks within {spread:.1%}, {WITHIN:.0%} allowed")
    if not options.dry:
        content = {"name": "memory", "rows": rows, "spread": round(spread, 4), "within": WITHIN}
        print(common.write(f"memory-{common.features()}", content))
    return 0 if spread <= WITHIN else 1


if __name__ == "__main__":
    sys.exit(main())
