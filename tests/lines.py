"""Both ends of a line over HTTP: the server that effc is, and servers that say whatever a test wants."""

import re
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager


@contextmanager
def served(directory, **options):
    """`effc delta serve` itself, in a process of its own; gives its address."""
    words = [sys.executable, "-m", "effc", "delta", "serve", str(directory), "--port", "0"]
    words += [
        str(w) for name, value in options.items() for w in (f"--{name.replace('_', '-')}", value)
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().split()[3].rstrip(",")
        finally:
            process.terminate()


@contextmanager
def answering(*answers):
    """A server that gives one raw answer after another, and the requests that it was sent."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as taken:

        def run():
            for answer in answers:
                try:
                    line, _ = taken.accept()
                except OSError:
                    return
                with line:
                    asked.append(request(line))
                    try:
                        for part in [answer] if isinstance(answer, bytes) else answer:
                            line.sendall(part)
                    except OSError:
                        pass

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{taken.getsockname()[1]}", asked
        taken.close()


def request(line):
    """All of a request: an answer to half of one may be lost."""
    found = line.recv(1 << 16)
    while found and b"\r\n\r\n" not in found:
        found += line.recv(1 << 16)
    head = found.decode(errors="replace").partition("\r\n\r\n")[0]
    (length,) = re.findall(r"(?i)content-length: (\d+)", head) or ["0"]
    left = len(head) + 4 + int(length) - len(found)
    while left > 0 and (more := line.recv(left)):
        left -= len(more)
    return head


def answer(content, status="200 OK", length=None, **headers):
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(content) if length is None else length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + content
