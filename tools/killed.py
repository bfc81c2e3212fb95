"""A compile that is killed at any moment, and one that the disk has no room for: what is there, and what comes next.

A trial starts a compile into a place of its own with a cache of its own, kills its whole process group after a time
drawn from the seed, and asks what a user would: is OUT not there or whole, is the cache whole, and does the same
command again give the same bytes as one that nobody disturbed, and leave nothing behind?
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Json = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
SMALL = "a small encoder"
MOST_TRIES = 2
"""A compile that is done before its time comes is not killed; this many trials are made for one that is."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where one compile has everything that it writes."""

    root: Path

    @property
    def out(self) -> Path:
        return self.root / "place" / "out"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def tmp(self) -> Path:
        return self.root / "tmp"

    def env(self) -> dict[str, str]:
        for folder in (self.out.parent, self.cache, self.tmp):
            folder.mkdir(parents=True, exist_ok=True)
        own = {"EFFC_CACHE": self.cache, "TMPDIR": self.tmp, "HOME": self.root}
        return {**os.environ, **{k: str(v) for k, v in own.items()}, "PYTHONDONTWRITEBYTECODE": "1"}

    def leftovers(self) -> list[str]:
        """What a run left beside OUT and among the temporary files."""
        known = {self.out, self.out.parent, self.cache, self.tmp, self.root / ".cache"}
        folders = (self.root, self.out.parent, self.tmp)
        left = [p for folder in folders for p in folder.iterdir() if p not in known]
        return sorted(str(p.relative_to(self.root)) for p in left)


def command(model: str, out: Path, words: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "effc",
        "-v",
        "compile",
        model,
        "-o",
        str(out),
        *shlex.split(words),
    ]


def run(
    model: str,
    place: Place,
    words: str,
    *,
    kill_after_s: float | None = None,
    before: Callable[[], None] | None = None,
) -> tuple[int, float, str]:
    """Exit code, seconds and stderr of a compile; its group is killed where it takes longer than `kill_after_s`."""
    started = time.monotonic()
    with subprocess.Popen(
        command(model, place.out, words),
        env=place.env(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,  # a file would be cut by a limit of `before`
        start_new_session=True,
        preexec_fn=before,
    ) as process:
        try:
            _, text = process.communicate(timeout=kill_after_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            _, text = process.communicate()
    taken = time.monotonic() - started
    return process.returncode, taken, text.decode("utf-8", "replace")


def hashed(out: Path) -> dict[str, str]:
    """sha256 of every file of a package that two equal compiles write alike, and of the manifest."""
    from effc import package

    manifest = package.read(out)
    return {**manifest.files, package.MANIFEST: package.digest(out / package.MANIFEST)}


def not_whole(out: Path) -> list[str]:
    """Why a place is neither free nor a whole package."""
    from effc import package
    from effc.errors import EffcError

    if not os.path.lexists(out):
        return []
    try:
        return [f"OUT: {word}" for word in package.check(out)]
    except EffcError as error:
        return [f"OUT: {error.what}"]


def broken_cache(root: Path) -> list[str]:
    from effc import cache

    return [f"cache: {word}" for word in cache.check(root)] if root.exists() else []


def stage_of(log: str) -> str:
    """The stage that a compile was in when it ended."""
    stages = [ln.removeprefix("stage ") for ln in log.splitlines() if ln.startswith("stage ")]
    return stages[-1].strip() if stages else "start"


def trial(number: int, args: argparse.Namespace, reference: Json) -> Json:
    """One compile, killed, looked at, and run again."""
    draw = random.Random(f"{args.seed}:{number}")
    after = draw.uniform(0, reference["seconds"])
    replaces = draw.random() < 0.5
    with tempfile.TemporaryDirectory(prefix="torture-kill-", dir=args.place) as folder:
        place = Place(root=Path(folder).resolve())
        if replaces:
            shutil.copytree(reference["out"], place.out)
        code, _, log = run(args.model, place, args.words, kill_after_s=after)
        faults = [f"after the kill, {word}" for word in not_whole(place.out)]
        if replaces and not place.out.exists():
            faults.append("after the kill, the old package is gone")
        code_again, seconds, text = run(args.model, place, args.words)
        if code_again:
            faults.append(f"again: {code_again}, {text.strip().splitlines()[-1:]}")
        else:
            faults += not_whole(place.out)
            if (found := hashed(place.out)) != reference["files"]:
                names = sorted(
                    n
                    for n in found.keys() | reference["files"].keys()
                    if found.get(n) != reference["files"].get(n)
                )
                faults.append(f"other bytes than undisturbed in {', '.join(names)}")
        faults += [f"left {name}" for name in place.leftovers()]
        faults += broken_cache(place.cache)
        if faults and args.keep:
            shutil.copytree(place.root, Path(args.keep) / str(number), symlinks=True)
    return {
        "after_s": round(after, 2), "was_killed": code == -signal.SIGKILL, "stage": stage_of(log),
        "replaced": replaces, "again_s": round(seconds, 2), "faults": faults,
    }  # fmt: skip


def undisturbed(args: argparse.Namespace, out: Path, jobs: int = 1) -> Json:
    """Seconds and bytes of a compile that nobody kills, beside as many others as there are jobs.

    Its package is copied to `out`.
    """
    with tempfile.TemporaryDirectory(prefix="torture-whole-", dir=args.place) as folder:
        places = [Place(root=Path(folder).resolve() / str(job)) for job in range(jobs)]
        with ThreadPoolExecutor(jobs) as pool:
            seconds = list(pool.map(lambda place: _whole(args, place), places))
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(places[0].out, out)
        return {"seconds": sum(seconds) / jobs, "files": hashed(out), "out": str(out)}


def _whole(args: argparse.Namespace, place: Place) -> float:
    code, seconds, text = run(args.model, place, args.words)
    if code:
        raise SystemExit(f"the compile itself ends with {code}:\n{text[-2000:]}")
    if faults := [*not_whole(place.out), *place.leftovers(), *broken_cache(place.cache)]:
        raise SystemExit(f"the compile itself is not in order: {faults}")
    return seconds


def kills_main(args: argparse.Namespace) -> int:
    """Trials until as many were killed as are asked for; with --state those that are done are not done again."""
    with tempfile.TemporaryDirectory(prefix="torture-reference-", dir=args.place) as folder:
        state_file = Path(args.state).resolve() if args.state else None
        key = {
            "model": args.model or SMALL, "words": args.words or "", "seed": args.seed,
            "jobs": args.jobs,
        }  # fmt: skip
        small_model(args, Path(folder))
        state: Json = {"key": key, "reference": None, "done": {}}
        if state_file and state_file.exists():
            state = json.loads(state_file.read_text(encoding="utf-8"))
            if state["key"] != key:
                raise SystemExit(f"{state_file} is of other trials: {state['key']}")
        out = state_file.with_suffix(".out") if state_file else Path(folder) / "out"
        if state["reference"] is None or not out.exists():
            state["reference"] = undisturbed(args, out, args.jobs)
            _keep(state_file, state)
        print(f"undisturbed: {state['reference']['seconds']:.1f} s", flush=True)
        _tried(args, state, state_file)
    done = _up_to(args.trials, state["done"])
    killed = sum(t["was_killed"] for t in done.values())
    summary = {
        **{name: without_places(str(word)) for name, word in key.items()},
        "trials": len(done),
        "killed": killed,
        "undisturbed_s": round(state["reference"]["seconds"], 1),
        "stages": dict(Counter(t["stage"] for t in done.values() if t["was_killed"])),
        "again_s_mean": round(sum(t["again_s"] for t in done.values()) / max(1, len(done)), 1),
        "failed": {n: t["faults"] for n, t in done.items() if t["faults"]},
    }
    print(
        f"{summary['trials']} trials, seed {args.seed}: {summary['killed']} killed, "
        f"{len(summary['failed'])} failed"
    )
    write_json(args.json, summary)
    return 1 if summary["failed"] or killed < args.trials else 0


def _tried(args: argparse.Namespace, state: Json, file: Path | None) -> None:
    """Trials, as many at once as there are jobs, until enough were killed."""
    done = state["done"]
    todo = (n for n in range(1, MOST_TRIES * args.trials + 1) if str(n) not in done)
    running: dict[Future[Json], int] = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        while True:
            killed = sum(t["was_killed"] for t in done.values())
            free = min(args.jobs, args.trials - killed) - len(running)
            for number in itertools.islice(todo, max(0, free)):
                running[pool.submit(trial, number, args, state["reference"])] = number
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                number = running.pop(future)
                done[str(number)] = found = future.result()
                _keep(file, state)
                print(_line(number, found), flush=True)


def _up_to(kills: int, done: Json) -> Json:
    """The first trials by number, until so many were killed."""
    found: Json = {}
    for number in sorted(done, key=int):
        if kills <= 0:
            break
        found[number] = done[number]
        kills -= done[number]["was_killed"]
    return found


def _line(number: int, found: Json) -> str:
    how = "killed" if found["was_killed"] else "was done"
    text = f"{number}: {how} after {found['after_s']} s in {found['stage']}, again {found['again_s']} s"
    return "\n    FAULT ".join([text, *found["faults"]])


def _keep(file: Path | None, state: Json) -> None:
    if file is None:
        return
    part = file.with_suffix(".part")
    part.write_text(json.dumps(state, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, file)


def write_json(file: str | None, summary: Json) -> None:
    if not file:
        return
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import common

    text = json.dumps({**common.circumstances(), **summary}, indent=1, sort_keys=True) + "\n"
    Path(file).write_text(text, encoding="utf-8")


def without_places(words: str) -> str:
    """Words with the names of files, and not where they lie here."""
    return re.sub(r"[^\s:=]*/", "", words)


def small_model(args: argparse.Namespace, place: Path) -> None:
    """Where no model is named: an encoder of some thousand weights, quantised on made sentences."""
    if args.model:
        args.words = "--no-bench" if args.words is None else args.words
        return
    sys.path.insert(0, str(ROOT / "tests"))
    import kit

    args.model = str(kit.save_encoder(place / "model"))
    sentences = kit.write_sentences(place / "sentences.txt")
    if args.words is None:
        args.words = f"--no-bench --quantize int8 --calib {sentences}"


# A full disk


def file_limit(bytes_: int) -> Callable[[], None]:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, bytes_))

    return limit


def small_disk(place: Path, kbytes: int) -> None:
    words = ["mount", "-t", "tmpfs", "-o", f"size={kbytes}k", "none", str(place)]
    subprocess.run(words, check=True, capture_output=True)


def can_mount() -> bool:
    """Whether this user may have a disk of his own size."""
    with tempfile.TemporaryDirectory(prefix="torture-mount-") as place:
        try:
            small_disk(Path(place), 16)
        except (OSError, subprocess.CalledProcessError):
            return False
        subprocess.run(["umount", place], check=True)
        return True


def sizes_of(out: Path) -> list[int]:
    """Limits that stop a compile at every file of its package: each one byte short of it."""
    return sorted({p.stat().st_size - 1 for p in out.rglob("*") if p.is_file()})


def full_main(args: argparse.Namespace) -> int:
    """No room for any file of a package, and disks of all sizes where this user may mount them."""
    failed: Json = {}
    counts: Counter[str] = Counter()
    stages: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="torture-full-", dir=args.place) as folder:
        root = Path(folder).resolve()
        name = without_places(args.model or SMALL)
        small_model(args, root)
        reference = undisturbed(args, root / "reference")
        limits = sizes_of(Path(reference["out"]))
        limits = limits[:: max(1, len(limits) // args.trials)][: args.trials]
        for how, code, stage, faults in itertools.chain(
            _limited(args, root, reference, limits), _mounted(args, root, reference)
        ):
            counts[str(code)] += 1
            stages[stage if code else "none"] += 1
            print("\n    FAULT ".join([f"{how}: {code} in {stage}", *faults]), flush=True)
            if faults:
                failed[how] = faults
    summary = {
        "model": name, "words": without_places(args.words), "codes": dict(counts),
        "stages": dict(stages), "failed": failed, "trials": sum(counts.values()),
        "mounted": can_mount(),
    }  # fmt: skip
    if not summary["mounted"]:
        print("small disks are left out: they need the right to mount a tmpfs")
    print(f"{summary['trials']} times no room: exit codes {dict(counts)}, {len(failed)} failed")
    write_json(args.json, summary)
    return 1 if failed else 0


Found = tuple[str, int, str, list[str]]
"""What had no room, the exit code, the stage that it ended in, and what is wrong."""


def _limited(
    args: argparse.Namespace, root: Path, reference: Json, limits: Sequence[int]
) -> Iterator[Found]:
    for bytes_ in limits:
        place = Place(root=root / f"limit-{bytes_}")
        place.root.mkdir()
        code, _, text = run(args.model, place, args.words, before=file_limit(bytes_))
        faults = _after(args, place, reference, code, text)
        yield f"files of at most {bytes_} bytes", code, stage_of(text), faults
        shutil.rmtree(place.root)


def _mounted(args: argparse.Namespace, root: Path, reference: Json) -> Iterator[Found]:
    """The output, the temporary files or the cache on a disk that is too small."""
    if not can_mount():
        return
    total = sum(p.stat().st_size for p in Path(reference["out"]).rglob("*") if p.is_file()) >> 10
    for what in ("place", "tmp", "cache"):
        for share in (0.02, 0.4, 0.9, 1.1):
            place = Place(root=root / f"{what}-{share}")
            (place.root / what).mkdir(parents=True)
            small_disk(place.root / what, max(16, int(total * share)))
            try:
                code, _, text = run(args.model, place, args.words)
                stage = stage_of(text)
                larger = ["mount", "-o", "remount,size=1g", str(place.root / what)]
                subprocess.run(larger, check=True)
                faults = _after(args, place, reference, code, text)
                if what == "cache" and code:
                    faults.append("a cache without room is no reason to fail")
                yield f"{what} on a disk of {share} of the package", code, stage, faults
            finally:
                subprocess.run(["umount", str(place.root / what)], check=True)
                shutil.rmtree(place.root)


def _after(
    args: argparse.Namespace, place: Place, reference: Json, code: int, text: str
) -> list[str]:
    """What is wrong after a compile that had no room, and with the next that has."""
    faults = []
    if code not in (0, 12):
        faults.append(f"ended with {code}: {text.strip().splitlines()[-2:]}")
    if "Traceback" in text:
        faults.append("showed a traceback")
    if code and place.out.exists():
        faults.append("OUT is there")
    faults += [f"left {name}" for name in place.leftovers()]
    code, _, text = run(args.model, place, args.words)
    if code:
        return [*faults, f"again: {code}, {text.strip().splitlines()[-1:]}"]
    if hashed(place.out) != reference["files"]:
        faults.append("other bytes than with room")
    return [*faults, *not_whole(place.out), *broken_cache(place.cache)]
