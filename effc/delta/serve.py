"""Releases of a directory over HTTP(S), each found by the package that it is for.

    GET /<sha256 of a package>.effd?above=N     the release for who serves that package, of the greatest number above N;
                                                where there is none, the anchor of the greatest number above N
    GET /anchor.effd?above=N                    that anchor, for who serves nothing that is whole

Ranges and ETags are starlette's. The directory is read at every request, so a release is published by a rename into it.
"""

from __future__ import annotations

import functools
import logging
import os
import socket
from pathlib import Path

from effc.delta import device, packet
from effc.errors import DeltaError, UsageError

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import FileResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise DeltaError(
        "starlette and uvicorn serve releases", hint="pip install 'effc[delta]'"
    ) from error

log = logging.getLogger(__name__)
SUFFIX = ".effd"
MOST_CLIENTS = 256


def application(directory: Path) -> Starlette:
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

    return Starlette(routes=[Route(f"/{{base}}{SUFFIX}", release)])


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
    cert: Path | None = None,
    cert_key: Path | None = None,
) -> None:
    """Answer on a socket until the process is told to end, in TLS where there is a certificate. Raises DeltaError."""
    config = uvicorn.Config(
        application(directory), log_config=None, access_log=False, limit_concurrency=MOST_CLIENTS,
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
    uvicorn.Server(config).run(sockets=[taken])
