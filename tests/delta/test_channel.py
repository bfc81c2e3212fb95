"""A release arrives over lines that break and from servers that lie, or it does not, and the device serves on."""

import json
import shutil
import socket

import numpy as np
import pytest
import urllib3
from lines import answer, answering, served

from effc.delta import channel, device, serve
from effc.errors import DeltaError, UsageError
from kit import assert_letter, cli


@pytest.fixture
def releases(world):
    place = world.place / "releases"
    place.mkdir()
    return place


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(channel.time, "sleep", lambda _: None)


def test_a_device_pulls_one_release_after_another(world, releases):
    store = world.store()
    shutil.copy(world.delta(), releases / "one.effd")
    shutil.copy(world.delta(world.new, world.old, counter=2), releases / "two.effd")
    (releases / "other.effd").write_text("no delta")
    with served(releases) as url:
        for counter in (1, 2):
            ran = cli("delta", "pull", url, store, "--json", "-")
            assert ran.code == 0, ran.err
            assert json.loads(ran.out)["counter"] == counter
            device.confirm(store)
        ran = cli("delta", "pull", url, store)
        assert ran.code == 0 and "no release behind" in ran.out
    assert not any((store / channel.INCOMING).iterdir())


def test_a_release_that_was_taken_back_is_not_offered_again(world, releases):
    store = world.store()
    shutil.copy(world.delta(counter=3), releases / "three.effd")
    with served(releases) as url:
        assert channel.pull(url, store).counter == 3
        device.rollback(store)
        assert channel.pull(url, store) is None
        shutil.copy(world.delta(counter=4), releases / "four.effd")
        assert channel.pull(url, store).counter == 4


def test_it_listens_on_this_machine_alone_unless_told():
    for word, wanted in (("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "0.0.0.0")):
        with serve.listening(word, 0) as taken:
            assert taken.getsockname()[0] == wanted
    with serve.listening("127.0.0.1", 0) as taken, pytest.raises(UsageError, match="port"):
        serve.listening("127.0.0.1", taken.getsockname()[1])


def test_nothing_but_releases_is_served(world, releases):
    (releases / "key").write_text("secret")
    with served(releases) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        for path in ("/", "/..%2f..%2fetc%2fpasswd.effd", "/a/../key.effd", "/key", "/%00.effd"):
            with socket.create_connection((host, int(port))) as line:
                line.sendall(
                    f"GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()
                )
                found = b"".join(iter(lambda line=line: line.recv(4096), b""))
            assert found.startswith(b"HTTP/1.1 404") and b"secret" not in found, path


def test_a_broken_line_costs_what_was_not_yet_there(world):
    store, up = world.store(), world.delta().read_bytes()
    half = len(up) // 2
    rest = answer(up[half:], "206 Partial Content", Content_Range=f"bytes {half}-{len(up) - 1}/{len(up)}")  # fmt: skip
    with answering(answer(up[:half], length=len(up), ETag='"a"'), rest) as (url, asked):
        assert channel.pull(url, store).counter == 1
    assert "Range" not in asked[0]
    assert f"Range: bytes={half}-" in asked[1] and 'If-Range: "a"' in asked[1]


def test_what_a_process_got_the_next_one_goes_on_with(world, releases):
    store, up = world.store(), world.delta().read_bytes()
    half = len(up) // 2
    broken = [answer(up[:half], length=len(up), ETag='"a"'), *[b""] * channel.TRIES]
    with answering(*broken) as (url, _), pytest.raises(DeltaError, match="cannot be read") as error:
        channel.pull(url, store)
    assert f"{half} bytes are kept" in error.value.hint
    assert (store / channel.INCOMING / channel.PART).read_bytes() == up[:half]


@pytest.mark.parametrize("second", ["changed", "elsewhere", "shorter"])
def test_parts_of_two_files_are_not_put_together(world, second):
    store, up = world.store(), world.delta().read_bytes()
    first = answer(b"?" * 900, length=10**4, ETag='"old"')
    whole = answer(up, ETag='"new"')
    between = {
        "changed": [whole],
        "elsewhere": [answer(up, "206 Partial Content", Content_Range="bytes 0-9/10"), whole],
        "shorter": [answer(b"", "416 Range Not Satisfiable", Content_Range="bytes */5"), whole],
    }[second]
    with answering(first, *between) as (url, _):
        assert channel.pull(url, store).counter == 1


@pytest.mark.parametrize(
    ("word", "sent"),
    [
        ("more than the", [answer(b"", length=10**12)]),
        ("more than the", [[b"HTTP/1.1 200 OK\r\n\r\n", *[bytes(1 << 20)] * 99]]),
        ("is no delta", [answer(b"<html>log in</html>")]),
        ("none of the trusted keys", [answer(b"effd\x01\0\0\0" + bytes(99))]),
        ("answers 403", [answer(b"", "403 Forbidden")]),
        ("answered 503", [answer(b"", "503 Service Unavailable")] * channel.TRIES),
        ("cannot be read", [b"SSH-2.0-x\r\n"] * channel.TRIES),
        ("cannot be read", [answer(b"", "302 Found", Location="/there.effd")] * 99),
        ("is no delta", [answer(b"\x1f\x8b" + bytes(40), Content_Encoding="gzip")]),
    ],
)
def test_a_server_that_lies_is_refused_and_the_store_serves_on(world, word, sent):
    store = world.store()
    before = device.record_of(store)
    with answering(*sent) as (url, _), pytest.raises(DeltaError, match=word) as refused:
        channel.pull(url, store)
    assert refused.value.hint
    assert device.start(store)[1] == before
    assert not list((store / channel.INCOMING).glob(channel.PART))


def test_a_server_that_says_nothing_is_not_waited_for_long(world, monkeypatch):
    monkeypatch.setattr(channel, "TIMEOUT", urllib3.Timeout(connect=1, read=0.1))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(DeltaError, match="timed out"):
            channel.pull(url, world.store())


@pytest.mark.parametrize("url", ["ftp://a/b", "file:///etc", "nothing", "http://", "http://["])  # fmt: skip
def test_what_is_no_address_is_refused(world, url):
    assert_letter(cli("delta", "pull", url, world.store()), "DeltaError", 14, "no address")


def test_nothing_is_fetched_for_a_release_that_is_not_proved(world):
    store = world.store()
    device.apply(store, world.delta())
    with answering() as (url, asked), pytest.raises(DeltaError, match="not proved"):
        channel.pull(url, store)
    assert asked == []


def test_one_pull_at_a_time(world):
    store = world.store()
    with device.alone(store, ".pull"), pytest.raises(DeltaError, match="another process"):
        channel.pull("http://127.0.0.1:1", store)


def test_a_device_serves_on_while_it_pulls_and_where_that_fails(world, releases):
    x = np.ones((1, 64), "f4")
    live = device.Live(world.store())
    old = live({"x": x})["y"]
    with pytest.raises(DeltaError):
        live.pull("http://127.0.0.1:1")
    assert np.array_equal(live({"x": x})["y"], old)
    shutil.copy(world.delta(), releases / "one.effd")
    with served(releases) as url:
        assert live.pull(url).pending
    assert not np.array_equal(live({"x": x})["y"], old)


def certificate(place):
    """A certificate for 127.0.0.1 that signed itself."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "effc")])
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(here, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    (place / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (place / "cert.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return place / "cert.pem", place / "cert.key"


def test_over_https_the_certificate_must_be_one_that_is_trusted(world, releases):
    store = world.store()
    cert, key = certificate(world.place)
    shutil.copy(world.delta(), releases / "one.effd")
    with served(releases, cert=cert, cert_key=key) as url:
        assert url.startswith("https://")
        with pytest.raises(DeltaError, match=r"(?i)certificate"):
            channel.pull(url, store)
        assert channel.pull(url, store, ca=cert).counter == 1
    ran = cli("delta", "serve", releases, "--port", 0, "--cert", releases / "one.effd")
    assert_letter(ran, "DeltaError", 14, "as a certificate")
