"""docs/training.md: its commands are ones that exist, its example is read, its recipes are there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from dmv_fast import cli
from dmv_fast.training import catalog as catalogs

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "training.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in block.splitlines()]


@pytest.mark.parametrize("line", [line for line in COMMANDS if "dmv-fast" in line or "-m dmv_fast " in line])
def test_commands_parse(line):
    words = shlex.split(line.split(">")[0].replace("-m dmv_fast ", "dmv-fast "))
    words = words[words.index("dmv-fast") + 1 :]
    args = cli._parser(words).parse_args(words)
    assert callable(args.run)
    for word in words:
        assert not word.startswith("recipes/") or (ROOT / word).is_file()


def test_all_recipes_are_described():
    named = set(re.findall(r"`(\w+)\.yaml`", PAGE))
    assert {path.stem for path in (ROOT / "recipes").glob("*.yaml")} <= named


def test_the_example_is_a_training_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(catalogs, "is_held_out", lambda name: False)
    (example,) = re.findall(r"```json\n(.*?)```", PAGE, re.S)
    (tmp_path / "annotations.jsonl").write_text(json.dumps(json.loads(example)) + "\n")
    catalog = catalogs.load_catalog(tmp_path)
    assert [thing.label for thing in catalog.objects] == ["car"] and catalog.cutouts == [0]
