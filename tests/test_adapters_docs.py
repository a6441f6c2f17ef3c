"""docs/adapters.md as a whole; its blocks are run where their hosts are tested."""

from __future__ import annotations

import ast
import re

from adapter_clip import ROOT, blocks

PAGE = (ROOT / "docs" / "adapters.md").read_text(encoding="utf-8")
TESTED = {  # section -> the test file in which all of its python and ini blocks are run
    "OpenCV": "opencv",
    "got10k toolkit": "got10k",
    "pytracking, STARK, OSTrack and their like": "pytracking",
    "PySOT": "pysot",
    "VOT toolkit": "vot",
    "supervision": "supervision",
}


def test_each_section_is_taken_by_its_hosts_test():
    assert re.findall(r"^## (.*)$", PAGE, re.M) == list(TESTED)
    for section, host in TESTED.items():
        test = (ROOT / "tests" / f"test_adapters_{host}.py").read_text(encoding="utf-8")
        assert f'blocks("{section}", ' in test
        for block in blocks(section, "python"):
            ast.parse(block)


def test_every_block_is_in_a_section_and_of_a_language_that_is_run():
    found = sum(len(blocks(section, language)) for section in TESTED for language in ("python", "ini", "sh"))
    assert found == PAGE.count("```") / 2


def test_extras_that_the_page_installs_exist():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = project[project.index("[project.optional-dependencies]") :]
    named = re.findall(r'pip install "dmv-fast\[(\w+)\]"', PAGE)
    assert len(named) == 3
    for extra in named:
        assert re.search(rf"^{extra} = \[", extras, re.M), extra


def test_each_adapter_is_on_the_page():
    files = {path.stem for path in (ROOT / "dmv_fast" / "adapters").glob("*.py")} - {"__init__"}
    assert files == set(re.findall(r"dmv_fast\.adapters\.(\w+)", PAGE))
