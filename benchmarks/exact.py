"""What every exact pass is worth: engines with all of them beside engines without one.

    python benchmarks/exact.py            # writes benchmarks/results/exact-FEATURES.json

Each model is built in float and in int8 for every runtime, with all exact passes, without each of them, with none, and
with projections fused. A ratio is form ÷ engine with all, with its 99 % interval; threads: 2.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

import effc
from effc.backends import BACKENDS
from effc.backends.base import Lowered
from effc.backends.dialect import DIALECTS
from effc.bench import compare
from effc.compiler import trace_source
from effc.ir.program import Program
from effc.measure import opener, shaped_cases
from effc.passes import CANONICAL, PASSES
from effc.recipe import CalibSpec
from effc.samples import Samples
from effc.source import Source, load

THREADS = 2
Json = dict[str, Any]


def models() -> dict[str, tuple[Source, str, tuple[tuple[int, int], ...]]]:
    found = {
        "MiniLM-L6": (
            load({"transformers": str(common.minilm())}), str(common.SENTENCES), ((1, 16), (1, 128)),
        )
    }  # fmt: skip
    data = common.data_root()
    if data is not None:
        llama = load({"transformers": str(data / "stories260k-llama")})
        text = str(data / "tinystories" / "train_head.txt")
        found["Llama stories260K"] = (llama, text, ((1, 64), (8, 64)))
    return found


def forms() -> dict[str, list[str]]:
    """Exact passes by the name of the form."""
    every = list(CANONICAL)
    return {
        "all": every,
        "none": [],
        **{f"without {name}": [n for n in every if n != name] for name in every},
        "with fuse-projections": [*every, "fuse-projections"],
    }


def engines(
    program: Program, samples: Samples, target: str, quantised: bool, place: Path
) -> tuple[dict[str, Lowered], dict[str, int]]:
    """One engine a form, and how many sites each pass found; forms in which a pass found none are left out."""
    found: dict[str, Lowered] = {}
    sites: dict[str, int] = {}
    for name, words in forms().items():
        made, counts = program.clone(), {}
        for word in words:
            counts[word] = effc.apply(PASSES[word](), made, samples, dialect=DIALECTS[target]).sites
        if name == "all":
            sites |= counts
        elif name.startswith("without ") and not sites[name.removeprefix("without ")]:
            continue
        elif name.startswith("with "):
            sites["fuse-projections"] = counts["fuse-projections"]
        if quantised:
            for word in ("smooth", "quantize"):
                effc.apply(PASSES[word](), made, samples, dialect=DIALECTS[target])
        found[name] = BACKENDS[target]().lower(made.only(), place / name)
    return found, sites


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=float, default=25.0, help="seconds for a shape")
    parser.add_argument("--model", choices=list(models()), help="all where none is named")
    options = parser.parse_args()
    rows = []
    for name, (source, calib, shapes) in models().items():
        if options.model not in (None, name):
            continue
        samples = Samples(source, CalibSpec(file=calib, samples=64))
        program = trace_source(source)
        for target in ("ort", "openvino"):
            for quantised in (False, True):
                with tempfile.TemporaryDirectory(prefix="effc-exact-") as place:
                    made, sites = engines(program, samples, target, quantised, Path(place))
                    cases = shaped_cases(samples, shapes, made["all"].inputs)
                    timed = compare(
                        {
                            "engine" if form == "all" else form: opener(low, THREADS)
                            for form, low in made.items()
                        },
                        cases, threads=THREADS, budget_s=options.budget,
                    ).to_json()  # fmt: skip
                rows.append(
                    {
                        "model": name,
                        "target": target,
                        "int8": quantised,
                        "sites": sites,
                        "shapes": timed["shapes"],
                    }
                )
                print(name, target, "int8" if quantised else "float", sites)
                for shape in timed["shapes"]:
                    for form, other in shape["against"].items():
                        word = f"{shape['batch']}x{shape['length']} {form}"
                        print(
                            f"    {word:40} {other['ratio']:.3f} [{other['low']:.3f}, {other['high']:.3f}]",
                            flush=True,
                        )
    if options.model is None:
        print(
            common.write(
                f"exact-{common.features()}", {"name": "exact", "threads": THREADS, "rows": rows}
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
