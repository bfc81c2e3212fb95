"""A model on a device is kept fresh: it sends up what it is unsure of, a larger one teaches it, and a delta comes down.

    python examples/cloud_device/run.py [--smoke | --fast] [--json FILE] [--html FILE]     # minutes
    python examples/cloud_device/run.py --state DIR [--stages N …] [--json FILE]  # hours, in units that can be stopped
    python examples/cloud_device/run.py --state DIR --arms akd labels --domains ink shifts --seeds 2

The device runs an int8 engine of effc from a store; every accuracy here is that engine's. `world.py` draws pictures
and questions, `models.py` trains encoder, student and teacher, `arms.py` says what is compared and `plans.py` how much
of it. One round (`unit.py`): the engine answers a stream of pictures of a domain that it was not trained for; of those
above a calibrated threshold it queues the tokens of the highest scores; the cloud (`cloud.py`, `lessons.py`) trains
adapters of the student on them towards the teacher, compiles with frozen calibration, and sends a signed delta of
bounded size, which the device takes in a transaction. `summary.py` says what came of it and `page.py` shows it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import arms as made_of
import page
import summary
import world
from plans import PLANS, SHIFTS, UNSEEN, Plan, Stage
from study import TESTED, Study

Json = dict[str, Any]


def asked(given: argparse.Namespace, plan: Plan) -> Plan:
    """The plan with the stages that were asked for: those by number, or one of what was named."""
    if given.stages:
        return dataclasses.replace(plan, stages=tuple(plan.stages[i - 1] for i in given.stages))
    if not (given.arms or given.domains or given.seeds):
        return plan
    first = plan.stages[0]
    stage = Stage(
        arms=tuple(given.arms or first.arms), domains=tuple(given.domains or first.domains),
        seeds=given.seeds or first.seeds,
    )  # fmt: skip
    return dataclasses.replace(plan, stages=(stage,))


def parsed(words: list[str] | None = None) -> tuple[argparse.Namespace, str]:
    """What the command line says, and the name of its plan."""
    parser = argparse.ArgumentParser(description="A device's model is kept fresh from a cloud.")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    parser.add_argument("--fast", action="store_true", help="short training, one seed, one domain")
    parser.add_argument("--arms", nargs="+", choices=tuple(made_of.EVERY), metavar="ARM")
    parser.add_argument("--domains", nargs="+", choices=(*UNSEEN, SHIFTS))
    parser.add_argument("--seeds", type=int, help="how many, from 0")
    parser.add_argument("--stages", nargs="+", type=int, metavar="N", help="of the plan, from 1")
    parser.add_argument("--state", type=Path, help="where finished units lie; thrown away where not given")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what was measured")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page that shows it")
    given = parser.parse_args(words)
    kind = "smoke" if given.smoke else "fast" if given.fast else "full"
    count = len(PLANS[kind].stages)
    if given.seeds is not None and given.seeds < 1:
        parser.error("--seeds: 1 or more")
    if given.stages and not all(1 <= n <= count for n in given.stages):
        parser.error(f"--stages: 1 to {count}")
    if given.stages and (given.arms or given.domains or given.seeds):
        parser.error("--stages: these have arms, domains and seeds of their own")
    return given, kind


def main() -> int:
    given, kind = parsed()
    began, cpu = time.perf_counter(), time.process_time()
    with contextlib.ExitStack() as stack:
        state = given.state or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="effc-")))  # fmt: skip
        plan = asked(given, PLANS[kind])
        study = Study(plan, state)
        units = study.units()
        found: Json = {
            "example": "cloud_device", "kind": kind, **summary.told(units),
            "parameters": sum(p.numel() for m in (study.encoder, study.student(0)) for p in m.parameters()),
            "plan": plan.measured(),
            "data": {
                "name": "shapes, drawn", "n": plan.test,
                "sha256": hashlib.sha256(world.drawn(world.DOMAINS["dusk"], 4, TESTED).pictures.tobytes()).hexdigest(),
            },
        }  # fmt: skip
    found["wall_s"] = round(time.perf_counter() - began, 1)
    found["cpu_s"] = round(time.process_time() - cpu, 1)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if given.html:
        given.html.write_text(page.drawn(found), encoding="utf-8")
    shown = ("rounds", "uplink", "recovered_fraction", "faults")
    print(json.dumps({name: found[name] for name in shown}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
