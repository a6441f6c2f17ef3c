"""README and docs say what is so: commands are there and run, code blocks run, messages and links exist."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import shlex
from pathlib import Path

import pytest
from doc_pages import PAGES, ROOT, blocks, commands, lay_desk

from dmv_fast import cli
from dmv_fast.training.recipe import load_recipe

# test_adapters_*.py run its blocks within the hosts' own loops; the other two have a test file of their name.
CODE_RUN_ELSEWHERE = {"adapters.md", "annotate.md", "export.md"}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A working directory in which the names that the pages use are there."""
    lay_desk(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(words: list[str]) -> None:
    cli._parser(words).parse_args(cli._join_box(words))


@every_page
def test_commands_are_there(page):
    for line in commands(page):
        words = [word for word in shlex.split(line) if word != "..."]
        if words[0] == "dmv-fast":
            if words[1:] and not words[1].startswith("-") and len(words) > 2:
                parse(words[1:])
            else:
                assert words[1] in cli._COMMANDS or words[1].startswith("-"), line
            for word in words:
                if re.fullmatch(r"recipes/\w+\.yaml", word):
                    load_recipe(ROOT / word)
        elif words[0] == "make":
            targets = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
            for target in targets:
                assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), line
        elif words[0] == "pip":
            check_extras(line)
        elif words[0] == "python" and "/" in words[1]:
            check_script(words, line)


def check_extras(line: str) -> None:
    for extras in re.findall(r"\[([\w,]+)\]", line):
        project = (ROOT / "pyproject.toml").read_text()
        known = re.search(r"optional-dependencies\]\n(.*?)\n\[project", project, re.S)[1]
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = ", known, re.M), f"no extra {extra!r}: {line}"


def check_script(words: list[str], line: str) -> None:
    script = ROOT / words[1]
    assert script.is_file(), line
    if script.is_relative_to(ROOT / "examples"):
        return
    text = "\n".join(path.read_text() for path in script.parent.rglob("*.py"))
    for word in words[2:]:
        if word.startswith("--"):
            assert f'"{word.split("=")[0]}"' in text, f"{words[1]} has no option {word}: {line}"


@pytest.mark.parametrize(
    ("page", "number"),
    [
        (page, i)
        for page in PAGES
        if page.name not in CODE_RUN_ELSEWHERE
        for i in range(len(blocks(page, "python")))
    ],
    ids=lambda value: value.name if isinstance(value, Path) else str(value),
)
def test_python_blocks_run(page, number, desk, capsys):
    source = blocks(page, "python")[number]
    exec(compile(source, f"{page.name}[{number}]", "exec"), {"__name__": "__main__"})
    if "TrackResult(" in source:
        assert "TrackResult(box=" in capsys.readouterr().out


def test_interface_is_what_the_page_says():
    """Each `Name(parameters)` of api.md against the code."""
    page = (ROOT / "docs" / "api.md").read_text()
    names: dict[str, object] = {}
    exec(blocks(ROOT / "docs" / "api.md", "python")[0], names)
    current, checked = None, 0
    for title, call in re.findall(r"^## (\w+)|`(\w+\([\w, ]*\))`", page, re.M):
        current = names.get(title, current) if title else current
        if not call:
            continue
        node = ast.parse(call, mode="eval").body
        said = [argument.id for argument in node.args]
        thing = names.get(node.func.id) or getattr(current, node.func.id, None)
        if node.func.id == "len":
            continue
        assert thing is not None, f"api.md: {node.func.id} is not there"
        real = [name for name in inspect.signature(thing).parameters if name != "self"]
        assert said == real, f"api.md says {call}, the code {node.func.id}({', '.join(real)})"
        checked += 1
    assert checked >= 12


@functools.cache
def sources() -> str:
    files = [ROOT / "setup.py", *(ROOT / "dmv_fast").rglob("*.py")]
    joined = "".join(path.read_text(encoding="utf-8") for path in files)
    return re.sub(r'"\s*f?"', "", joined)  # messages that go over several lines


def test_faq_quotes_what_is_said():
    quoted = re.findall(r"`([^`]+)`", (ROOT / "docs" / "faq.md").read_text())
    not_ours = r"ImportError|apt|pip|python|cv2|\(frame|TORCH"
    messages = [q for q in quoted if len(q.split()) > 4 and not re.match(not_ours, q)]
    assert len(messages) > 8
    for message in messages:
        pieces = re.split(r"\.\.\.|\(.*?\)|'\w+'|\d+ x \d+|\b(?:cpu|float32|NoneType)\b", message)
        longest = re.sub(r"(out the) .*", r"\1 ", max(pieces, key=len)).strip(" :;`")
        assert longest in sources(), f"faq.md quotes {message!r}, but nothing says {longest!r}"


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_is_found_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    for page in sorted((ROOT / "docs").glob("*.md")):
        assert f"docs/{page.name}" in readme, f"README.md does not name docs/{page.name}"
