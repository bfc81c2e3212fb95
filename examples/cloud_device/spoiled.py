"""Spoiled releases at a device's door, and spoiled payloads at a cloud's: each is to be refused, changing nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import world

from effc.delta import device, packet, uplink
from effc.errors import DeltaError

if TYPE_CHECKING:
    from unit import Unit

Json = dict[str, Any]
PAYLOADS = 4
"""Spoiled payloads that `refused` tries."""
REASONS = {
    "flipped bit": "trusted keys", "truncated": "trusted keys", "signed by another": "trusted keys",
    "wrong base": "is for package", "older release": "is not above",
}  # fmt: skip
"""What of the reason must be said of each spoiled release."""


def tried(unit: Unit, releases: Sequence[Path]) -> Json:
    """Releases that a device has no reason to take, and how many it refused while its engine answered as before."""
    from unit import feeds_of

    last = releases[-1].read_bytes()
    other, other_key = unit.place / "other.effd", unit.place / "other.key"
    packet.keygen(other_key, other_key.with_suffix(".pub"))
    own = packet.private_key(unit.study.key)
    given = packet.parsed(last)
    spoiled = {
        "flipped bit": bytes([*last[:99], last[99] ^ 4, *last[100:]]),
        "truncated": last[: len(last) // 2],
        "signed by another": packet.written(given, packet.private_key(other_key)),
        "wrong base": packet.written(
            dataclasses.replace(given, counter=99, base="0" * 64, target="1" * 64), own
        ),
        "older release": packet.written(
            dataclasses.replace(given, counter=1, target="1" * 64), own
        ),
    }
    feeds = next(feeds_of(world.drawn(world.DOMAINS[unit.course[-1]], 2, 78)))
    wanted, record = unit.live(feeds), device.record_of(unit.store)
    reasons, survived = {}, 0
    for name, content in spoiled.items():
        other.write_bytes(content)
        try:
            unit.live.update(other)
            reasons[name] = "taken"
        except DeltaError as error:
            reasons[name] = error.what
        again = device.Live(unit.store)(feeds)
        same = all(np.array_equal(wanted[n], again[n]) for n in wanted)
        survived += (
            REASONS[name] in reasons[name] and same and device.record_of(unit.store) == record
        )
    return {"injected": len(spoiled), "survived": survived, "reasons": reasons}


def refused(content: bytes, who: Mapping[str, str]) -> int:
    """How many of four spoiled payloads are refused: of another engine or tokenizer, cut, and with a bit flipped."""
    tries = [
        (content, {**who, "engine": "0" * 64}), (content, {**who, "tokenizer": "0" * 64}),
        (content[:-9], who), (content[:-20] + bytes([content[-20] ^ 1]) + content[-19:], who),
    ]  # fmt: skip
    count = 0
    for given, asked in tries:
        try:
            uplink.read(given, asked)
        except DeltaError:
            count += 1
    return count
