"""What effc does where everything goes wrong: spoilt inputs, a killed process, a full disk.

    python tools/torture.py malformed --seed 0 --count 300 [--only KIND] [--case 17] [--json FILE]
    python tools/torture.py kills [--model MODEL --words "--quantize int8 --calib FILE"] [--trials 20]
                                    [--jobs 2] [--state FILE]
    python tools/torture.py full [--model MODEL --words …]

Ends with 1 where something did not go as it must, and says how to see that again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import resource
import shlex
import shutil
import signal
import stat
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import killed

MOST_SECONDS = 60
MOST_BYTES = 6 << 30
"""Address space that a command may take on top of what a started effc has."""
MOST_RESIDENT_MB = 3000
"""Resident memory, effc itself included, above which a spoilt input counts as a bomb that went off."""
CACHE = ".cache/effc"
"""Below HOME: the one place besides OUT that effc may write to."""


# A box: a command in a child with limits, and everything that it did


@dataclass(frozen=True, kw_only=True)
class End:
    """How a command ended; `code` is below zero for a signal, and None where its time was up.

    Of `seconds`, those are left out in which it was ready to run and others had the processor.
    """

    code: int | None
    seconds: float
    peak_mb: float
    text: str


def boxed(words: Sequence[str], place: Path, seconds: float = MOST_SECONDS) -> End:
    """Run effc's command line in a fork of this process, in `place/work`, under limits."""
    for name in ("work", "home", "tmp"):
        (place / name).mkdir(exist_ok=True)
    log = place / "log"
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _inside(words, place, log)
    code, waited = None, 0.0
    while True:
        waited = _waited(child) or waited
        done, status, usage = os.wait4(child, os.WNOHANG)
        taken = time.monotonic() - started - waited
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        if taken > seconds:
            os.killpg(child, signal.SIGKILL)
            _, _, usage = os.wait4(child, 0)
            break
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    return End(
        code=code, seconds=taken, peak_mb=usage.ru_maxrss / 1e3,
        text=log.read_bytes().decode(errors="replace"),
    )  # fmt: skip


def _waited(process: int) -> float:
    """Seconds that a process was ready to run and others were running; 0 where the system does not say."""
    try:
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        return 0.0


def _inside(words: Sequence[str], place: Path, log: Path) -> None:
    """The child: never returns."""
    code = 70
    try:
        os.setsid()
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        os.environ |= {"HOME": str(place / "home"), "TMPDIR": str(place / "tmp")}
        for name in ("XDG_CACHE_HOME", "EFFC_CACHE", "TORCHINDUCTOR_CACHE_DIR"):
            os.environ.pop(name, None)
        tempfile.tempdir = None
        os.chdir(place / "work")
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins here, not in the parent
        _limit(resource.RLIMIT_AS, _address_space() + MOST_BYTES)
        _limit(resource.RLIMIT_CPU, 4 * MOST_SECONDS)
        _limit(resource.RLIMIT_CORE, 0)
        import torch

        from effc import cli

        torch.set_num_threads(1)
        if words[0].startswith("part:"):
            import malformed

            sys.exit(malformed.run_part(tuple(words)))
        sys.argv = ["effc", *words]
        cli.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _limit(what: int, value: int) -> None:
    resource.setrlimit(what, (value, value))


def _address_space() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return 8 << 30
    line = next(ln for ln in status.read_text().splitlines() if ln.startswith("VmSize"))
    return int(line.split()[1]) << 10


def warm() -> None:
    """Load all that a command loads, once, without starting a thread: a fork has none of its parent's."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    import onnx
    import onnxruntime
    import PIL.Image
    import torch
    import transformers

    from effc import cli, compiler, inspection, recipe
    from effc.backends import onnx_export, onnx_file, ort

    for name in ("BertModel", "ViTForImageClassification", "AutoTokenizer", "AutoModel"):
        getattr(transformers, name)
    for opset in (21, 23):
        onnx_export.registry(opset, ours=True)
    _ = onnx, onnxruntime, PIL.Image, torch, cli, compiler, inspection, recipe, onnx_file, ort


def in_a_fork(make: Any) -> None:
    """Call `make` where the threads that it starts do no harm here."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            make()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if status:
        raise SystemExit("the good material could not be made")


def seen(place: Path, but: Sequence[Path] = ()) -> dict[str, str]:
    """Everything below a folder by name: what it is, and the sha256 of what is in it."""
    found = {}
    for folder, folders, files in os.walk(place):
        here = Path(folder)
        folders[:] = [name for name in folders if here / name not in but]
        for name in (*folders, *files):
            path = here / name
            if path in but:
                continue
            mode = path.lstat().st_mode
            word = stat.filemode(mode)
            if stat.S_ISREG(mode):
                word += hashlib.sha256(path.read_bytes()).hexdigest()
            elif stat.S_ISLNK(mode):
                word += os.readlink(path)
            found[os.fsencode(path.relative_to(place)).decode("utf-8", "backslashreplace")] = word
    return found


# Spoilt inputs


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One spoilt input, how its command ended, and what of that may not be."""

    number: int
    kind: str
    note: str
    words: tuple[str, ...]
    end: End
    faults: tuple[str, ...]


def try_one(
    seed: int, number: int, base: Any, only: str | None, keep: Path | None = None
) -> Outcome:
    import malformed

    place = keep or Path(tempfile.mkdtemp(prefix="effc-torture-"))
    try:
        work = place / "work"
        work.mkdir(parents=True)
        kind, case = malformed.case_of(seed, number, work, base, only)
        out = _out_of(case.words, work)
        replaces = case.words[0] == "compile"
        own = [out, *(place / name for name in ("log", "home", "tmp"))]
        before, was = seen(place, own), seen(out)
        end = boxed(case.words, place)  # a compile, or a part of one, or a look at a package
        faults = [*_wrong_end(end, case.codes)]
        if end.code is not None and (after := seen(place, own)) != before:
            changed = {n for n in after.keys() | before.keys() if after.get(n) != before.get(n)}
            faults.append(f"wrote beside OUT: {sorted(changed)[:5]}")
        if (not replaces or end.code) and seen(out) != was:
            faults.append("changed OUT")
        if replaces and end.code == 0:
            faults += _not_whole(out)
        home, tmp = seen(place / "home", [place / "home" / CACHE]), seen(place / "tmp")
        files = [n for n in home if n != ".cache"] + list(tmp)
        if files and end.code is not None:
            faults.append(f"left {files[:5]} in HOME or TMPDIR")
        return Outcome(
            number=number,
            kind=kind,
            note=case.note,
            words=case.words,
            end=end,
            faults=tuple(faults),
        )
    finally:
        if keep is None:
            shutil.rmtree(place, ignore_errors=True)


def _out_of(words: Sequence[str], work: Path) -> Path:
    """Where a command may write: what -o names, where that is a new folder in `work`."""
    named = words[words.index("-o") + 1] if "-o" in words else "OUT"
    is_odd = named in ("", ".", "..", "-") or named.startswith("/") or len(named) > 255
    return work / ("OUT" if is_odd else named)


def _wrong_end(end: End, codes: frozenset[int]) -> Iterator[str]:
    if end.code is None:
        yield f"did not end within {MOST_SECONDS} s"
    elif end.code < 0:
        yield f"ended by signal {-end.code}"
    elif end.code not in codes:
        yield f"ended with {end.code}, not one of {sorted(codes)}"
    if "Traceback" in end.text:
        yield "showed a traceback"
    if end.code and len(end.text.strip()) == 0:
        yield "said nothing"
    told = any(word in end.text for word in ("\n    ", "did you mean", "known: "))
    if end.code and not told and end.code != 2:
        yield "gave no next step"
    if end.peak_mb > MOST_RESIDENT_MB:
        yield f"took {end.peak_mb:.0f} MB"


def _not_whole(out: Path) -> list[str]:
    from effc import package
    from effc.errors import EffcError

    try:
        return [f"made no whole package: {word}" for word in package.check(out)[:3]]
    except EffcError as error:
        return [f"made no package: {error.what}"]


def malformed_main(args: argparse.Namespace) -> int:
    warm()
    import malformed

    with tempfile.TemporaryDirectory(prefix="effc-torture-base-") as folder:
        base = malformed.Base(place=Path(folder).resolve())
        in_a_fork(lambda: malformed.make_base(base.place))
        numbers = range(args.count) if args.case is None else [args.case]
        outcomes = []
        for number in numbers:
            keep = Path(args.keep).resolve() if args.keep else None
            found = try_one(args.seed, number, base, args.only, keep)
            outcomes.append(found)
            if args.verbose or found.faults or args.case is not None:
                _tell(found, args)
        idle = idle_mb()
    summary = _summary(args.seed, outcomes, idle)
    print(_line(summary))
    killed.write_json(args.json, summary)
    return 1 if summary["failed"] else 0


def idle_mb() -> float:
    """Resident memory of this process, which a command begins with."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def _tell(found: Outcome, args: argparse.Namespace) -> None:
    e = found.end
    print(
        f"{found.number} {found.kind}: {found.note}: {e.code}, {e.seconds:.1f} s, {e.peak_mb:.0f} MB"
    )
    for fault in found.faults:
        print(f"    FAULT {fault}")
    if found.faults or args.case is not None:
        only = f" --only {args.only}" if args.only else ""
        print(
            f"    python tools/torture.py malformed --seed {args.seed} --case {found.number}{only}"
        )
        print(f"    effc {shlex.join(found.words)}"[:300])
        lines = e.text.strip().splitlines()
        print("\n".join(f"    | {line[:200]}" for line in lines[-args.lines :]), flush=True)


def _summary(seed: int, outcomes: Sequence[Outcome], idle: float) -> dict[str, Any]:
    kinds: dict[str, Counter[str]] = {}
    for o in outcomes:
        kinds.setdefault(o.kind, Counter())[str(o.end.code)] += 1
    return {
        "seed": seed,
        "inputs": len(outcomes),
        "failed": [f"{o.number} {o.kind}: {'; '.join(o.faults)}" for o in outcomes if o.faults],
        "codes": dict(Counter(str(o.end.code) for o in outcomes)),
        "kinds": {name: dict(codes) for name, codes in sorted(kinds.items())},
        "peak_mb": round(max(o.end.peak_mb for o in outcomes)),
        "idle_mb": round(idle),
        "longest_s": round(max(o.end.seconds for o in outcomes), 1),
    }


def _line(summary: Mapping[str, Any]) -> str:
    codes = ", ".join(f"{n} × {code}" for code, n in sorted(summary["codes"].items()))
    return (
        f"{summary['inputs']} spoilt inputs of {len(summary['kinds'])} kinds, seed {summary['seed']}: "
        f"{len(summary['failed'])} failed; exit codes {codes}; peak {summary['peak_mb']} MB "
        f"({summary['idle_mb']} MB before), longest {summary['longest_s']} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    spoilt = modes.add_parser("malformed")
    spoilt.add_argument("--seed", type=int, default=0)
    spoilt.add_argument("--count", type=int, default=300)
    spoilt.add_argument("--case", type=int, help="this number of the seed alone")
    spoilt.add_argument("--only", help="these kinds alone, with commas between")
    spoilt.add_argument("--keep", help="make the input in this new folder, and leave it there")
    spoilt.add_argument(
        "--lines", type=int, default=8, help="how many lines of a failure are shown"
    )
    spoilt.add_argument("--verbose", "-v", action="store_true")
    spoilt.add_argument("--json")
    spoilt.set_defaults(run=malformed_main)
    for name, run in (("kills", killed.kills_main), ("full", killed.full_main)):
        mode = modes.add_parser(name)
        mode.add_argument("--model", help="what is compiled [default: a small encoder, to int8]")
        mode.add_argument("--words", help="more words of the compile, as one")
        mode.add_argument("--trials", type=int, default=20)
        mode.add_argument("--seed", type=int, default=0)
        if name == "kills":
            mode.add_argument("--jobs", type=int, default=1, help="trials at once")
        mode.add_argument("--place", help="where to work [default: the temporary directory]")
        mode.add_argument("--state", help="a file that remembers finished trials")
        mode.add_argument("--keep", help="copy everything of a failed trial to this folder")
        mode.add_argument("--json")
        mode.set_defaults(run=run)
    args = parser.parse_args()
    found: int = args.run(args)
    return found


if __name__ == "__main__":
    sys.exit(main())
