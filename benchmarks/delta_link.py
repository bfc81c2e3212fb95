"""An update over a slow line that breaks: how long every stage takes, and what the device's answers wait for meanwhile.

    python benchmarks/delta_link.py [--state DIR] [--rounds N] [--smoke]   # 30 min; writes results/delta_link.json

Three processes: `effc delta serve`, a line of 1 or 20 Mbit/s each way that loses 2 % of what passes through it, each
time with the connection, and a device that answers a sentence every 25 ms on one thread while it fetches and takes a
release beside that. MiniLM-L6 in int8 goes from its base to tuned norms and head or tuned everything
(`benchmarks/delta.py`) and back. Waiting is counted from when a sentence was due, so that a stall counts for all that
came due in it. `idle` is as long before every update. The interval of the ratio of 99th percentiles is a bootstrap over
updates, 95 %.

Then a thread asks without a pause while release after release is taken: the longest gap between two answers is held
against the longest answer while nothing is taken. Ends with 1 where a call failed, or the interval reaches above 2.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

Json = dict[str, Any]
ROUNDS = 10
"""Updates there and back for every line and model."""
MOST_RATIO = 2.0
"""Of the 99th percentile of waiting during an update to that before it, at the upper end of its interval."""
SPEEDS = (1.0, 20.0)
LOSS = 0.02
PIECE = 16384
"""Bytes that a line carries at once at most; what it carries may be lost, and the connection with it."""
EVERY_S = 0.025
IDLE_S = 4.0
SEED = 0
PLACES = 32
STOP = 100
"""Steps of tuning everything: of those of `benchmarks/delta.py` the first."""
MODELS = ("norms", f"everything{STOP}")


async def line(to: int, mbit: float, seed: int) -> None:
    """A line to a port of this machine: tells its own port, then carries at most so much, and breaks."""
    draw = random.Random(seed)
    up, down = asyncio.Lock(), asyncio.Lock()

    async def carry(reader: Any, writer: Any, free: asyncio.Lock) -> None:
        while piece := await reader.read(PIECE):
            async with free:
                await asyncio.sleep(len(piece) * 8 / (mbit * 1e6))
            if draw.random() < LOSS:
                raise ConnectionError
            writer.write(piece)
            await writer.drain()

    async def connected(reader: Any, writer: Any) -> None:
        theirs, mine = await asyncio.open_connection("127.0.0.1", to)
        try:
            await asyncio.gather(carry(reader, mine, up), carry(theirs, writer, down))
        except ConnectionError:
            print("broken", file=sys.stderr, flush=True)
        finally:
            for end in (mine, writer):
                end.transport.abort()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def device(store: Path, url: str) -> Json:
    """What one device sees of one update, and what it answers behind it."""
    from effc.delta.device import Live

    live, feeds = Live(store), _sentence(store)
    return {**updated(live, store, feeds, url), "served": live(feeds)["logits"].tolist()}


def updated(live: Any, store: Path, feeds: Json, url: str, every_s: float = EVERY_S) -> Json:
    """One update: stages in seconds, and waiting in milliseconds before and during it of who asks every so often."""
    from effc.delta import channel

    stages: Json = {}
    waited: list[tuple[float, float]] = []
    failed: list[str] = []
    over = threading.Event()

    def answer() -> None:
        for _ in range(20):
            live(feeds)
        due = time.perf_counter()
        while not over.is_set():
            time.sleep(max(0.0, due - time.perf_counter()))
            try:
                live(feeds)
            except Exception as error:
                failed.append(repr(error))
            waited.append((due, (time.perf_counter() - due) * 1e3))
            due += every_s

    def take(file: Path) -> Any:
        stages["fetch"] = time.perf_counter() - began
        record = live.update(file)
        stages["take"] = time.perf_counter() - began - stages["fetch"]
        return record

    serving = threading.Thread(target=answer)
    serving.start()
    time.sleep(IDLE_S)
    began = time.perf_counter()
    record = channel.pull(url, store, take=take)
    ended = time.perf_counter()
    time.sleep(10 * every_s)  # three answers prove the release
    over.set()
    serving.join()
    assert record is not None
    return {
        **stages, "release": record.counter, "id": record.id, "failed": failed,
        "idle_ms": [ms for due, ms in waited if due < began - every_s],
        "during_ms": [ms for due, ms in waited if began <= due <= ended],
    }  # fmt: skip


def asked(store: Path, files: list[Path]) -> list[Json]:
    """A thread asks without a pause while each of these releases is taken: longest gaps (ms), and calls that failed."""
    from effc.delta.device import Live

    live, feeds = Live(store), _sentence(store)
    found = []
    for file in files:
        ended: list[float] = []
        failed: list[str] = []
        over = threading.Event()

        def ask(ended: list[float], failed: list[str], over: threading.Event) -> None:
            while not over.is_set():
                try:
                    live(feeds)
                    ended.append(time.perf_counter())
                except Exception as error:
                    failed.append(repr(error))

        asking = threading.Thread(target=ask, args=(ended, failed, over))
        asking.start()
        time.sleep(IDLE_S)
        began = time.perf_counter()
        live.update(file)
        took = time.perf_counter() - began
        time.sleep(10 * EVERY_S)
        over.set()
        asking.join()
        at, gaps = np.array(ended[20:]), np.diff(ended[19:]) * 1e3  # the first ones warm up
        during = (at > began) & (at - gaps / 1e3 < began + took)
        found.append(
            {"idle_ms": gaps[at <= began].max(), "gap_ms": gaps[during].max(), "take": took,
             "answers": len(ended), "answers_during": int(during.sum()), "failed": failed}
        )  # fmt: skip
    return found


def asking(place: Path, ends: tuple[Path, Path], count: int) -> Json:
    """What `asked` says of so many updates there and back, in a process of its own."""
    from effc.delta import device as store_of
    from effc.delta import make, packet

    word = packet.keygen(place / "key", place / "key.pub")
    store_of.init(place / "store", ends[0], [word])
    files = []
    for number in range(1, 2 * count + 1):
        old, new = ends if number % 2 else ends[::-1]
        files.append(place / f"{number}.effd")
        files[-1].write_bytes(make.make(old, new, key=place / "key", counter=number).content)
    words = [sys.executable, __file__, "--asked", place / "store", *files]
    told = subprocess.run([*map(str, words)], stdout=subprocess.PIPE, check=True)
    rows = json.loads(told.stdout)
    longest, idle = (max(row[key] for row in rows) for key in ("gap_ms", "idle_ms"))
    return {
        "updates": len(rows), "answers": sum(row["answers"] for row in rows),
        "longest_gap_ms": longest, "longest_idle_ms": idle, "ratio": longest / idle,
        "median_gap_ms": float(np.median([row["gap_ms"] for row in rows])),
        "take_s": float(np.median([row["take"] for row in rows])),
        "failed_calls": sum(len(row["failed"]) for row in rows),
    }  # fmt: skip


def _sentence(store: Path) -> Json:
    rows = np.arange(PLACES, dtype=np.int64)[None]
    feeds = {"input_ids": 1000 + rows, "attention_mask": np.ones_like(rows)}
    if "token_type_ids" in _inputs(store):
        feeds["token_type_ids"] = np.zeros_like(rows)
    return feeds


def _inputs(store: Path) -> list[str]:
    from effc.delta.device import manifest_of, start

    return [port["name"] for port in manifest_of(start(store)[0])["engines"][0]["inputs"]]


@contextmanager
def process(*words: Any, err: Any = None) -> Iterator[subprocess.Popen[str]]:
    started = subprocess.Popen(
        [sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=err, text=True
    )
    try:
        yield started
    finally:
        started.kill()
        started.wait()


def rounds(place: Path, ends: tuple[Path, Path], mbit: float, count: int) -> list[Json]:
    """Updates there and back over one line."""
    from effc.delta import device as store_of
    from effc.delta import make, packet

    word = packet.keygen(place / "key", place / "key.pub")
    store, releases = place / "store", place / "releases"
    releases.mkdir()
    store_of.init(store, ends[0], [word])
    found: list[Json] = []
    port = _free_port()
    me = Path(__file__)
    with (
        (place / "line.txt").open("w", encoding="utf-8") as broken,
        process("-m", "effc", "delta", "serve", releases, "--port", port),
        process(me, "--line", port, "--mbit", mbit, err=broken) as carrier,
    ):
        assert carrier.stdout is not None
        url = f"http://127.0.0.1:{int(carrier.stdout.readline())}"
        _wait_for(port)
        for number in range(1, 2 * count + 1):
            old, new = ends if number % 2 else ends[::-1]
            began = time.perf_counter()
            made = make.make(old, new, key=place / "key", counter=number)
            make_s = time.perf_counter() - began
            (releases / f"{number}.part").write_bytes(made.content)
            (releases / f"{number}.part").rename(releases / f"{number}.effd")
            before = (place / "line.txt").read_text(encoding="utf-8").count("broken")
            told = subprocess.run(
                [sys.executable, me, "--device", store, url], stdout=subprocess.PIPE, check=True
            )
            after = (place / "line.txt").read_text(encoding="utf-8").count("broken")
            row = json.loads(told.stdout)
            found.append(
                {"make": make_s, "bytes": len(made.content), "broken": after - before, **row}
            )
            words = ("bytes", "broken", "make", "fetch", "take")
            print(mbit, number, {k: round(found[-1][k], 2) for k in words}, flush=True)
            assert row["release"] == number
    there, back = ({json.dumps(row["served"]) for row in found[first::2]} for first in (0, 1))
    assert len(there) == len(back) == 1 and there != back  # the device answers as the release does
    return found


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def _wait_for(port: int) -> None:
    import socket

    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("effc delta serve does not answer")


def told(updates: list[Json]) -> Json:
    """Medians of the stages, and how long answers were waited for."""
    return {
        "updates": len(updates), "bytes": int(np.median([u["bytes"] for u in updates])),
        "broken": sum(u["broken"] for u in updates), "seconds": medians(updates, ("make", "fetch", "take")),
        **waits(updates),
    }  # fmt: skip


def medians(rows: list[Json], names: Iterable[str]) -> dict[str, float]:
    return {name: float(np.median([row[name] for row in rows])) for name in names}


def waits(updates: list[Json]) -> Json:
    """The 99th percentile of waiting before and during updates, and the ratio of both with its interval."""
    draw = np.random.default_rng(SEED)

    def ratio(chosen: list[Json]) -> float:
        idle, during = (
            np.percentile(np.concatenate([u[word] for u in chosen]), 99)
            for word in ("idle_ms", "during_ms")
        )
        return float(during / idle)

    again = [
        ratio([updates[i] for i in draw.integers(0, len(updates), len(updates))])
        for _ in range(500)
    ]
    low, high = np.quantile(again, [0.025, 0.975])
    p99 = {
        word: float(np.percentile(np.concatenate([u[f"{word}_ms"] for u in updates]), 99))
        for word in ("idle", "during")
    }
    return {
        "p99_ms": p99, "p99_ratio": {"ratio": ratio(updates), "low": float(low), "high": float(high)},
        "answers": sum(len(u["idle_ms"]) + len(u["during_ms"]) for u in updates),
        "failed_calls": sum(len(u["failed"]) for u in updates),
    }  # fmt: skip


def missed(lines: list[Json], every: Json) -> list[str]:
    """What does not hold, in words; an interval of one update is none, so that of the smoke run never fails."""
    found = [
        f"{each['model']} at {each['mbit']:g} Mbit/s: p99 up to {each['p99_ratio']['high']:.2f} times idle"
        for each in lines
        if each["updates"] > 2 and not each["p99_ratio"]["high"] <= MOST_RATIO
    ]
    failed = sum(each["failed_calls"] for each in (*lines, *every.values()))
    return found + ([f"{failed} calls failed"] if failed else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", help="where trained models and packages are kept")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--smoke", action="store_true", help="one update, no result")
    parser.add_argument("--line", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--mbit", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--device", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--asked", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.line is not None:
        asyncio.run(line(args.line, args.mbit, SEED))
    if args.device is not None:
        print(json.dumps(device(Path(args.device[0]), args.device[1])))
        return 0
    if args.asked is not None:
        store, *files = map(Path, args.asked)
        print(json.dumps(asked(store, files)))
        return 0
    import common  # torch with it, which no device has

    data = common.data_root()
    if data is None:
        print("skipped: EFFC_DATA has no sst2")
        return 0
    import delta

    with tempfile.TemporaryDirectory(prefix="effc-link-") as scratch:
        place, state = Path(scratch), Path(args.state or scratch)
        state.mkdir(parents=True, exist_ok=True)
        scale = delta.SMOKE[0] if args.smoke else 1.0
        out = delta.packages(state, data, delta.checkpoints(state, data, scale, (STOP,)))
        count = 1 if args.smoke else args.rounds
        lines, every = [], {}
        for name in MODELS[: 1 if args.smoke else None]:
            ends = out["base"], out[name]
            for mbit in SPEEDS[1:] if args.smoke else SPEEDS:
                (there := place / f"{name}-{mbit:g}").mkdir()
                measure = functools.partial(rounds, there, ends, mbit, count)
                made = delta.kept(state, f"link-{name}-{mbit:g}-{count}", measure)
                lines.append({"model": name, "mbit": mbit, **told(made)})
            (there := place / f"{name}-asked").mkdir()
            measure = functools.partial(asking, there, ends, count)
            every[name] = delta.kept(state, f"link-{name}-asked-{count}", measure)
    print(json.dumps({"lines": lines, "asked": every}, indent=1))
    if not args.smoke:
        found = {"name": "delta_link", "loss": LOSS, "piece": PIECE, "lines": lines, "asked": every}
        print(common.write("delta_link", found))
    for text in (texts := missed(lines, every)):
        print(f"MISSED: {text}")
    return 1 if texts else 0


if __name__ == "__main__":
    sys.exit(main())
