"""Brick with a quick helper, and Cinder through a front."""

import json
import sys
from pathlib import Path

import pytest

from basefs.volumes.brick import Brick

ROOT = Path(__file__).parents[2]


class Behaviour:
    """What quick helpers do at their next requests."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.is_to()
        self.command = (sys.executable, "-I", "-S", str(ROOT / "tests/fakes/quick_helper.py"), str(path))

    def is_to(self, **words: str) -> None:
        self._path.write_text(json.dumps(words))


@pytest.fixture
def behaviour(tmp_path: Path) -> Behaviour:
    return Behaviour(tmp_path / "behaviour")


@pytest.fixture
def brick(tmp_path: Path, behaviour: Behaviour, nursery) -> Brick:
    return Brick(
        nursery=nursery, helpers_max=2, lock_path=tmp_path / "locks", is_multipath=False, command=behaviour.command
    )
