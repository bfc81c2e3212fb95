"""Packages, keys and a store that tests may share, and harm in copies."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from packages import weights, write

from effc.delta import device, make, packet


@dataclass(frozen=True, kw_only=True)
class World:
    place: Path
    key: Path
    word: str
    old: Path
    new: Path

    def delta(self, old=None, new=None, counter=1, name="up.effd", **how):
        made = make.make(old or self.old, new or self.new, key=self.key, counter=counter, **how)
        (self.place / name).write_bytes(made.content)
        return self.place / name

    def store(self, name="store"):
        device.init(self.place / name, self.old, [self.word])
        return self.place / name


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    place = tmp_path_factory.mktemp("delta")
    word = packet.keygen(place / "key", place / "key.pub")
    write(place / "old", weights())
    write(place / "new", weights(1, 0.01), source="1")
    return World(place=place, key=place / "key", word=word, old=place / "old", new=place / "new")


@pytest.fixture
def world(shared, tmp_path):
    """The shared packages, and a place of one's own."""
    place = shutil.copytree(shared.place, tmp_path / "world")
    return World(
        place=place, key=place / "key", word=shared.word, old=place / "old", new=place / "new"
    )
