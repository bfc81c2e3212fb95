"""A directory of releases over HTTP(S), each found by the package that it is for, and an inbox where one is given.

    GET /<sha256 of a package>.effd?above=N     the release for who serves that package, of the greatest number above N;
                                                where there is none, the anchor of the greatest number above N
    GET /anchor.effd?above=N                    that anchor, for who serves nothing that is whole
    PUT /<sha256 of a payload>.effu             what a device is unsure of, into the inbox

What is put in cannot be got out here. Ranges and ETags are starlette's. The directory is read at every request, so a
release is published by a rename into it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path

from effc.delta import device, packet, uplink
from effc.delta.inbox import Arrival, Inbox, Refused
from effc.errors import DeltaError, UsageError

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import FileResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise DeltaError(
        "starlette and uvicorn serve releases", hint="pip install 'effc[delta]'"
    ) from error

log = logging.getLogger(__name__)
SUFFIX = ".effd"
MOST_CLIENTS = 256
LEAST_RATE = 4000
"""Bytes in a second: who sends a payload more slowly is cut off."""
PATIENCE_S = 20
"""How long a sender may pause or be slower than that; what came faster before gives no more of it."""


def application(directory: Path, inbox: Inbox | None = None) -> Starlette:
    """What answers devices, for any server of ASGI."""

    def release(request: Request) -> Response:
        above = request.query_params.get("above", "0")
        file = newest(
            directory,
            request.path_params["base"],
            packet.number(above),
        )
        if file is None:
            return Response(status_code=404)
        return FileResponse(file, media_type="application/octet-stream")

    async def payload(request: Request) -> Response:
        assert inbox is not None
        try:
            await _received(request, inbox)
        except Refused as refused:
            log.info("a payload is refused: %s", refused.what)
            headers = {} if refused.after_s is None else {"Retry-After": str(refused.after_s)}
            if refused.status in (408, 411):  # nobody knows where the next request would begin
                headers["Connection"] = "close"
            return Response(status_code=refused.status, headers=headers)
        except DeltaError as error:  # the disk is full
            log.warning("a payload cannot be kept: %s", error.what)
            return Response(status_code=503, headers={"Retry-After": "60"})
        return Response(status_code=201)

    routes = [Route(f"/{{base}}{SUFFIX}", release)]
    if inbox is not None:
        routes.append(Route(f"/{{digest}}{uplink.SUFFIX}", payload, methods=["PUT"]))
    return Starlette(routes=routes)


async def _received(request: Request, inbox: Inbox) -> None:
    """Put a payload into the inbox. Raises Refused."""
    if "transfer-encoding" in request.headers:  # which goes before a length that is told as well
        raise Refused("its length is not told", hint="send Content-Length alone", status=411)
    size = packet.number(request.headers.get("content-length", ""))
    with ExitStack() as held:
        # whatever looks at the disk does so beside the loop that answers everybody
        arrival = await run_in_threadpool(held.enter_context, inbox.arriving(size))
        try:
            await _arrived(request, arrival)
            await run_in_threadpool(inbox.keep, request.path_params["digest"], arrival.content())
        finally:
            await run_in_threadpool(held.close)


async def _arrived(request: Request, arrival: Arrival) -> None:
    """Fill a payload from the line. Raises Refused."""
    now = asyncio.get_running_loop().time
    try:
        async with asyncio.timeout_at(now() + PATIENCE_S) as cut:
            async for chunk in request.stream():
                arrival.add(chunk)
                slower = (cut.when() or now()) + len(chunk) / LEAST_RATE
                cut.reschedule(min(now() + PATIENCE_S, slower))
    except (ClientDisconnect, TimeoutError) as error:
        raise Refused("it broke off", hint="send it again", status=408, after_s=1) from error


def newest(directory: Path, base: str, above: int) -> Path | None:
    """The release for a package with the greatest number above that, or an anchor to another package."""
    every = releases(directory)
    own = [(counter, file) for file, (start, _, counter) in every if start == base]
    anchors = [
        (counter, file) for file, (start, target, counter) in every
        if start == packet.ANCHOR and target != base
    ]  # fmt: skip
    for found in (own, anchors):
        counter, file = max(found, default=(0, None))
        if counter > above:
            return file
    return None


def releases(directory: Path) -> list[tuple[Path, tuple[str, str, int]]]:
    """Every release in a directory, with its base, target and number."""
    found = []
    for file in sorted(directory.glob(f"*{SUFFIX}")):
        try:
            stat = file.stat()
            found.append((file, _told(file, stat.st_mtime_ns, stat.st_size)))
        except (DeltaError, OSError) as error:
            log.warning("%s is left out: %s", file.name, error)
    return found


@functools.lru_cache(maxsize=1024)
def _told(file: Path, mtime_ns: int, size: int) -> tuple[str, str, int]:
    found = packet.parsed(packet.read(file, device.MOST_INSPECTED))
    return found.base, found.target, found.counter


def listening(host: str, port: int) -> socket.socket:
    """A socket there. Raises UsageError where that is not to be had."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=MOST_CLIENTS)
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"{host} port {port}: {error}", hint="--host 127.0.0.1 --port 8423, or a free one"
        ) from error


def serve(
    directory: Path,
    taken: socket.socket,
    *,
    inbox: Inbox | None = None,
    cert: Path | None = None,
    cert_key: Path | None = None,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Answer on a socket until the process is told to end, in TLS where there is a certificate. Raises DeltaError.

    An inbox is one server's at a time, which counts what comes. `ready` is called when nothing is left that may fail.
    """
    config = uvicorn.Config(
        application(directory, inbox), log_config=None, access_log=False, limit_concurrency=MOST_CLIENTS,
        timeout_keep_alive=5, timeout_graceful_shutdown=5, server_header=False,
        ssl_certfile=cert, ssl_keyfile=os.fspath(cert_key) if cert_key else None,
    )  # fmt: skip
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise DeltaError(
            f"{cert} does not serve as a certificate: {error}",
            hint="--cert and --cert-key name files in PEM",
        ) from error
    with inbox.alone() if inbox is not None else nullcontext():
        ready()
        uvicorn.Server(config).run(sockets=[taken])
