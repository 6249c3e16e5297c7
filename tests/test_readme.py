"""The README is short, and states the two commands that start everything."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text() if (ROOT / "README.md").is_file() else ""
LONGEST = 150  # lines


def test_it_is_short():
    assert 0 < len(TEXT.splitlines()) <= LONGEST


def test_it_states_how_to_train_and_to_test_verbatim():
    for command in ("pip install -e . && python train.py", "pip install -e '.[test]' && pytest"):
        assert f"\n{command}\n" in TEXT


def test_it_installs_every_device_by_an_extra_that_exists():
    project = (ROOT / "pyproject.toml").read_text()
    extras = set(re.findall(r"-e '\.\[([\w,]+)\]'", TEXT))
    assert {"gpu", "tpu", "test", "docs"} <= extras
    for extra in extras:
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE)
