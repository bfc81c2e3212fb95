"""Tokens go up over the channel that releases come down by: to who asks for them, within bounds, and none is lost."""

import hashlib
import http.client
import json
import re
import socket
import textwrap
import threading
import time
import tracemalloc
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from lines import answer, answering
from lines import served as serving
from payloads import WHO, Clock, tokens

from effc.delta import channel, device, inbox, push, serve, uplink
from effc.delta.inbox import Inbox, Refused
from effc.delta.uplink import Limits, Queue
from effc.errors import DeltaError
from kit import assert_letter, cli

WAIT = time.sleep


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(channel.time, "sleep", lambda _: None)


def queue(tmp_path, *contents, **limits):
    made = Queue(tmp_path / "up")
    made.opt_in(Limits(**limits))
    for content in contents:
        assert made.put(content)
    return made


def taking(tmp_path, who=WHO, **limits):
    made = Inbox(tmp_path / "inbox", limits=Limits(**limits))
    made.expect(who)
    return made


@cache  # the order of what a payload says of itself is drawn
def payload(seed=0, engine=WHO["engine"]):
    return uplink.pack(tokens(seed=seed), {**WHO, "engine": engine})


def served(tmp_path, **options):
    (tmp_path / "releases").mkdir(exist_ok=True)
    return serving(tmp_path / "releases", **options)


def asked(url, method, path, body=None, **headers):
    """The status of one raw request."""
    line = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    line.request(method, path, body, headers)
    return line.getresponse().status


def test_what_waits_goes_up_and_is_the_clouds_to_read(tmp_path):
    box, up = taking(tmp_path), queue(tmp_path, payload(0), payload(1))
    with served(tmp_path, uplink=box.place) as url:
        ran = cli("delta", "push", url, up.place, "--json", "-")
        assert ran.code == 0, ran.err
        assert json.loads(ran.out) == {"taken": 2, "refused": [], "waiting": 0}
        assert "payloads: 0 taken, 0 refused, 0 waiting" in cli("delta", "push", url, up.place).out
        up.put(payload(0))  # what was taken and not forgotten
        assert push.push(url, up).taken == 1
        assert asked(url, "GET", f"/{box.waiting()[0].name}") == 405  # nobody gets it out again
    found = [file.read_bytes() for file in box.waiting()]
    assert set(found) == {payload(0), payload(1)} and len(found) == 2  # also what came twice
    assert uplink.read(found[0], WHO).length == 49


def test_nothing_goes_up_unless_it_is_asked_for(tmp_path):
    up = queue(tmp_path, payload())
    with served(tmp_path) as url:
        ran = cli("delta", "push", url, up.place)
        assert_letter(ran, "DeltaError", 14, "takes nothing now: it answers 404", "1 payloads wait")
    nobody = Queue(tmp_path / "nobody")
    assert_letter(
        cli("delta", "push", "http://127.0.0.1:1", nobody.place), "DeltaError", 14, "may be sent"
    )
    assert not nobody.place.exists()
    ran = cli("delta", "serve", tmp_path, "--port", 0, "--uplink", tmp_path / "none")
    assert_letter(ran, "DeltaError", 14, "whose tokens it takes")
    for size in ("much", "0B", "-1MB"):
        assert_letter(
            cli("delta", "serve", tmp_path, "--uplink", tmp_path, f"--uplink-limit={size}"),
            "UsageError", 2, "--uplink-limit",
        )  # fmt: skip


def test_tokens_of_another_model_are_refused_and_not_sent_again(tmp_path):
    box = taking(tmp_path)
    up = queue(tmp_path, payload(0, "b" * 64), payload(1))
    with served(tmp_path, uplink=box.place) as url:
        found = push.push(url, up)
        assert (found.taken, found.waiting) == (1, 0) and "another model" in found.refused[0]
        box.expect({**WHO, "engine": "b" * 64})  # the device has taken a release meanwhile
        up.put(payload(0, "b" * 64))
        assert push.push(url, up).taken == 1
        assert asked(url, "PUT", f"/{'0' * 64}.effu", payload(1)) == 400
        assert asked(url, "PUT", f"/{hashlib.sha256(b'x').hexdigest()}.effu", b"x") == 422
        assert asked(url, "PUT", "/..%2fx.effu", b"x") in (400, 404)
        for size, status in ((0, 411), (10**12, 413)):
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as line:
                head = f"PUT /a.effu HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n"
                line.sendall(head.encode())
                assert line.recv(4096).startswith(f"HTTP/1.1 {status}".encode())
    assert len(box.waiting()) == 2


def test_a_day_and_a_directory_have_their_bytes_and_the_device_waits(tmp_path):
    size = len(payload())
    box, up = taking(tmp_path), queue(tmp_path, *map(payload, range(3)))
    with served(tmp_path, uplink=box.place, uplink_limit=f"{2 * size}B") as url:
        with pytest.raises(DeltaError, match="answers 429") as error:
            push.push(url, up)
        assert "1 payloads wait" in error.value.hint and len(box.waiting()) == 2
        (box.place / uplink.SPENT).unlink()  # the next day, and nobody has read what is there
        with pytest.raises(DeltaError, match="answers 503"):
            push.push(url, up)
        box.waiting()[0].unlink()
        assert push.push(url, up).taken == 1


def test_one_server_counts_for_an_inbox(tmp_path):
    box = taking(tmp_path)
    with served(tmp_path, uplink=box.place) as url:
        asked(url, "GET", "/")  # it is up
        ran = cli("delta", "serve", tmp_path, "--port", 0, "--uplink", box.place)
        assert_letter(ran, "DeltaError", 14, "another process")
        assert "releases at" not in ran.out  # nothing is announced that does not come


def test_what_a_killed_server_left_half_written_goes(tmp_path):
    box = taking(tmp_path)
    part = box.place / f".{'0' * 64}.effu.part"
    part.write_bytes(b"half")
    with served(tmp_path, uplink=box.place):
        assert not part.exists() and box.expected() == WHO


def test_files_have_a_bound_too_and_are_looked_at_only_where_it_is_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(inbox, "MOST_FILES", 2)
    box, looks = taking(tmp_path), []
    look = box._stats
    monkeypatch.setattr(box, "_stats", lambda: looks.append(1) or look())

    def comes(content):
        with box.arriving(len(content)) as arrival:
            arrival.add(content)
            box.keep(hashlib.sha256(content).hexdigest(), arrival.content())

    comes(payload(0))
    comes(payload(1))
    assert len(looks) == 1  # at first
    with pytest.raises(Refused, match="no room now") as refused:
        comes(payload(2))
    assert refused.value.status in channel.LATER and len(looks) == 2
    box.waiting()[0].unlink()  # somebody has read it
    comes(payload(2))
    assert len(box.waiting()) == 2


def test_who_reads_and_removes_meanwhile_is_in_nobodys_way(tmp_path):
    box, stop = taking(tmp_path), threading.Event()
    files = [box.place / f"{n:064x}.effu" for n in range(50)]
    stays = box.place / f"{'f' * 64}.effu"
    stays.write_bytes(b"x")

    def reads():
        while not stop.is_set():
            for file in files:
                file.write_bytes(b"x")
            for file in files:
                file.unlink()

    reader = threading.Thread(target=reads)
    reader.start()
    try:
        for _ in range(200):
            assert stays in box.waiting()
    finally:
        stop.set()
        reader.join()


def test_an_inbox_that_forgot_whose_tokens_it_takes_asks_for_them_later(tmp_path):
    box = taking(tmp_path)
    (box.place / inbox.TAKES).unlink()
    with pytest.raises(Refused, match="nobody said") as refused:
        box.keep(hashlib.sha256(payload()).hexdigest(), payload())
    assert refused.value.status in channel.LATER


def test_a_payload_that_breaks_off_costs_what_it_brought(tmp_path):
    box = taking(tmp_path, bytes_a_day=100)
    box.clock = Clock()
    with suppress(ConnectionError), box.arriving(60) as arrival:
        arrival.add(bytes(30))
        raise ConnectionError
    assert uplink.spent(box.place, box.clock())[1] == 30
    with box.arriving(60) as arrival:
        arrival.add(bytes(60))
        with pytest.raises(Refused, match="of the day"), box.arriving(20):
            pass  # what is on its way has its bytes already
    with pytest.raises(Refused, match="of the day") as refused, box.arriving(20):
        pass
    assert 0 < refused.value.after_s <= uplink.DAY_S + 1
    box.clock.now += uplink.DAY_S
    with box.arriving(60):
        pass


@pytest.mark.parametrize(
    ("bound", "word"),
    [("MOST_ARRIVING", "no room"), ("bytes_a_day", "of the day"), ("bytes_waiting", "no room")],
)
def test_bytes_have_their_room_as_they_arrive_and_not_as_they_are_announced(
    tmp_path, monkeypatch, bound, word
):
    monkeypatch.setattr(inbox, "MOST_ARRIVING", 100)
    box = taking(tmp_path, **({} if bound == "MOST_ARRIVING" else {bound: 100}))
    with box.arriving(60) as one, box.arriving(60) as other:
        one.add(bytes(50))
        other.add(bytes(50))
        with pytest.raises(Refused, match=word):
            one.add(b"x")
        with pytest.raises(Refused, match=word), box.arriving(1):
            pass


def test_a_payload_has_no_more_bytes_than_it_announced(tmp_path):
    from starlette.testclient import TestClient

    box = taking(tmp_path)
    with box.arriving(5) as arrival:
        arrival.add(b"12345")
        with pytest.raises(Refused, match="announced") as refused:
            arrival.add(b"6")
    assert refused.value.status == 413
    with TestClient(serve.application(tmp_path, box)) as client:
        found = client.put("/a.effu", content=b"123456", headers={"Content-Length": "5"})
    assert found.status_code == 413


def test_a_payload_is_held_once(tmp_path):
    box, chunk = taking(tmp_path, bytes_a_day=1 << 24), bytes(1 << 16)
    with box.arriving(1 << 23) as arrival:
        tracemalloc.start()
        for _ in range(1 << 7):
            arrival.add(chunk)
        content = arrival.content()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(content) == 1 << 23 and peak < 1.3 * len(content)


def head(size, *more):
    lines = ["PUT /a.effu HTTP/1.1", "Host: a", f"Content-Length: {size}", *more]
    return "\r\n".join([*lines, "", ""]).encode()


@contextmanager
def line_to(url):
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as line:
        yield line


def test_what_comes_in_chunks_without_an_end_is_refused_at_its_head(tmp_path):
    box = taking(tmp_path)
    with served(tmp_path, uplink=box.place) as url, line_to(url) as line:
        line.sendall(head(5, "Transfer-Encoding: chunked"))
        found = line.recv(4096)
        assert found.startswith(b"HTTP/1.1 411") and b"connection: close" in found.lower()
        assert line.recv(4096) == b""  # and nobody listens to what follows
    assert uplink.spent(box.place, time.time())[1] == 0


@contextmanager
def beside(tmp_path, box):
    """The server in a thread of this process, so that it has what a test has set."""
    taken = serve.listening("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(serve.application(tmp_path, box), log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.mark.parametrize("sent", [[], [b"x"] * 9, [bytes(1 << 20)]])
def test_who_sends_nothing_or_drop_by_drop_is_cut_off(tmp_path, monkeypatch, sent):
    monkeypatch.setattr(serve, "PATIENCE_S", 0.5)
    box = taking(tmp_path, bytes_a_day=1 << 28, bytes_waiting=1 << 28)
    with beside(tmp_path, box) as url, line_to(url) as line:
        line.sendall(head(64 << 20))
        began = time.monotonic()
        with suppress(OSError):  # it may be closed before the last drop
            for part in sent:
                line.sendall(part)
                WAIT(0.1)
        assert line.recv(4096).startswith(b"HTTP/1.1 408")
        assert 0.4 < time.monotonic() - began < 5  # what came fast before gives no more time
    assert not box.waiting()


def test_who_announces_much_and_sends_nothing_keeps_nobody_out(tmp_path):
    box = taking(tmp_path)
    with served(tmp_path, uplink=box.place) as url, ExitStack() as idle:
        for _ in range(8):
            idle.enter_context(line_to(url)).sendall(head(64 << 20))
        WAIT(0.5)
        name = hashlib.sha256(payload()).hexdigest()
        assert asked(url, "PUT", f"/{name}.effu", payload()) == 201


def test_an_inbox_that_is_harmed_or_of_nobody_takes_nothing(tmp_path):
    box = taking(tmp_path)
    for who in ({}, {"form": "x"}):
        with pytest.raises(DeltaError, match="whose tokens") as error:
            box.expect(who)
        assert error.value.hint
    file = box.place / inbox.TAKES
    file.write_text(file.read_text().replace("e" * 64, "f" * 64))
    assert box.expected() is None
    with pytest.raises(Refused, match="nobody said"), box.arriving(1):
        pass
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DeltaError, match="cannot be made"):
        Inbox(tmp_path / "file" / "in").expect(WHO)


def test_a_full_disk_is_no_answer_that_loses_a_payload(tmp_path, monkeypatch):
    from starlette.testclient import TestClient

    box, content = taking(tmp_path), payload()

    def full(*args):
        raise DeltaError("cannot be written", hint="free some disk space")

    monkeypatch.setattr(uplink, "write_whole", full)
    monkeypatch.setattr(uplink, "spend", lambda *args: None)
    with TestClient(serve.application(tmp_path, box)) as client:
        found = client.put(f"/{hashlib.sha256(content).hexdigest()}.effu", content=content)
    assert found.status_code == 503 in channel.LATER


@pytest.mark.parametrize(
    ("sent", "word"),
    [
        ([b"SSH-2.0-x\r\n"] * channel.TRIES, "takes nothing now"),
        ([answer(b"", "503 Service Unavailable")] * channel.TRIES, "answers 503"),
        ([answer(b"", "429 Too Many Requests")], "answers 429"),
        ([answer(b"", "302 Found", Location="http://127.0.0.1:1/")], "answers 302"),
        ([answer(b"<html>log in", "200 OK")], "answers 200"),
        ([answer(b"", "204 No Content")] * 2, None),
        ([b"", answer(b"", "201 Created"), answer(b"", "409 Conflict")], None),
    ],
)
def test_whatever_a_server_says_nothing_is_lost_before_it_was_taken(tmp_path, sent, word):
    up = queue(tmp_path, payload(0), payload(1))
    with answering(*sent) as (url, heard):
        if word is None:
            found = push.push(url, up)
            assert found.taken + len(found.refused) == 2 and not up.waiting()
        else:
            with pytest.raises(DeltaError, match=word) as error:
                push.push(url, up)
            assert error.value.hint and len(up.waiting()) == 2
    assert len(heard) == len(sent)


def test_every_attempt_counts_in_the_day_of_the_device_and_its_last_problem_is_told(tmp_path):
    size = len(payload())
    up = queue(tmp_path, payload(), bytes_a_day=2 * size)
    busy = answer(b"", "503 Service Unavailable")
    with answering(busy, busy) as (url, heard):
        with pytest.raises(DeltaError, match="answers 503") as error:
            push.push(url, up)
        assert "1 payloads wait" in error.value.hint and "tomorrow" in error.value.hint
    assert len(heard) == 2 and uplink.spent(up.place, time.time())[1] == 2 * size
    found = push.push(url, up)  # the day was over before: nothing was tried, so nothing went wrong
    assert (found.taken, found.waiting) == (0, 1)


def test_where_nobody_is_there_the_day_is_kept_for_who_comes(tmp_path):
    size = len(payload())
    box, up = taking(tmp_path), queue(tmp_path, payload(), bytes_a_day=size)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    ran = cli("delta", "push", f"http://127.0.0.1:{port}", up.place)
    assert_letter(ran, "DeltaError", 14, "takes nothing now", "refused", "1 payloads wait")
    assert uplink.spent(up.place, time.time())[1] == 0
    with served(tmp_path, uplink=box.place) as url:
        assert push.push(url, up).taken == 1
    assert uplink.spent(up.place, time.time())[1] == size


PAGE = Path(__file__).resolve().parents[2] / "docs" / "delta.md"


def blocks(text):
    """What stands indented on a page, block by block."""
    found = re.findall(r"(?m)(?:^(?:    .*)?\n)+", text)
    return [textwrap.dedent(block) for block in found if block.strip()]


def test_what_the_page_says_of_the_way_up_runs(world, monkeypatch):
    monkeypatch.chdir(world.place)
    store = world.store("STORE")
    sent, draw = tokens(20), np.random.default_rng(0)
    met = {"uts_sample_score": np.full(20, 2.0), "uts_index": sent.index, "uts_tokens": sent.tokens}
    known = {
        "ENCODER": "e" * 64, "TOKENIZER": "t" * 64, "ids": sent.beside["question"], "met": met,
        "day": {"uts_sample_score": draw.random(99)},
    }  # fmt: skip
    up, down = [
        b for b in blocks(PAGE.read_text(encoding="utf-8")) if "effc.delta.uplink import" in b
    ]
    exec(up, known)
    assert len(Queue(Path("QUEUE")).waiting()) == 1
    exec(down, known)
    with served(world.place, uplink="INBOX") as url:
        assert cli("delta", "push", url, "QUEUE").code == 0
    exec(down, known)
    assert known["sent"].sum() == 20 * 4 and known["who"]["engine"] == device.record_of(store).id


def test_every_command_stands_on_the_page_with_options_that_it_has():
    from typer.main import get_command

    from effc.cli import delta

    commands = get_command(delta).commands
    lines = [line.partition("#")[0].split() for block in blocks(PAGE.read_text(encoding="utf-8"))
             for line in block.splitlines() if line.startswith("effc delta ")]  # fmt: skip
    assert {words[2] for words in lines} == set(commands)
    for words in lines:
        known = {option for parameter in commands[words[2]].params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known, words


@pytest.mark.parametrize("url", ["ftp://a/b", "nothing", "http://["])
def test_what_is_no_address_is_refused(tmp_path, url):
    assert_letter(cli("delta", "push", url, queue(tmp_path).place), "DeltaError", 14, "no address")
