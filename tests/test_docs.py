"""README and docs say what is so: commands are there and run, code blocks run, messages and links exist."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest

from dmv_fast import cli
from dmv_fast.training.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# test_adapters_*.py run its blocks within the hosts' own loops; the other two have a test file of their name.
CODE_RUN_ELSEWHERE = {"adapters.md", "annotate.md", "export.md"}
# These wait for somebody, or for hours: they are parsed, not run.
PARSED_ONLY = ("--select", "--view", "--ray", "train ", "bench", "track 0", "--minutes")
BOX = (60, 50, 40, 36)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(page: Path) -> list[str]:
    """The lines of shell blocks, and commands in tables and running text."""
    text = page.read_text(encoding="utf-8")
    found = [line for block in blocks(page, "sh") for line in block.splitlines()]
    found += re.findall(r"`((?:dmv-fast|python|make|pip) [^`\n]+)`", text)
    joined = "\n".join(found).replace("\\\n", " ")
    lines = (line.split("  #")[0].strip() for line in joined.splitlines())
    return [line for line in lines if re.match(r"(dmv-fast|python|make|pip|torchrun) ", line)]


every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def moving_square(frames: int) -> list[np.ndarray]:
    """A textured square that moves two pixels a frame over another texture."""
    rng = np.random.default_rng(0)
    ground = cv2.resize(rng.integers(0, 120, (24, 32, 3), np.uint8), (320, 240))
    target = cv2.resize(rng.integers(100, 255, (6, 6, 3), np.uint8), BOX[2:], interpolation=cv2.INTER_CUBIC)
    clip = []
    for i in range(frames):
        frame, x = ground.copy(), BOX[0] + 2 * i
        frame[BOX[1] : BOX[1] + BOX[3], x : x + BOX[2]] = target
        clip.append(frame)
    return clip


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    """A working directory in which the names that the pages use are there."""
    clip = moving_square(8)
    writer = cv2.VideoWriter(str(tmp_path / "video.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 25, (320, 240))
    for frame in clip:
        writer.write(frame)
    writer.release()
    sequence = tmp_path / "DATASETS" / "OTB" / "Square"
    (sequence / "img").mkdir(parents=True)
    for i, frame in enumerate(clip, 1):
        cv2.imwrite(str(sequence / "img" / f"{i:04d}.jpg"), frame)
    lines = (f"{BOX[0] + 2 * i},{BOX[1]},{BOX[2]},{BOX[3]}" for i in range(len(clip)))
    (sequence / "groundtruth_rect.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "DEV").symlink_to(tmp_path / "DATASETS" / "OTB")
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "videos.csv").write_text("video,x,y,w,h\nvideo.mp4,60,50,40,36\n")
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


RUN_PAGES = [page for page in PAGES if page.name in ("README.md", "quickstart.md", "inspect.md")]


@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: page.name)
def test_commands_run(page, desk, capsys):
    """The first pages' commands, word for word but for the box, on a made clip."""
    ran = 0
    for line in commands(page):
        if not line.startswith("dmv-fast ") or len(shlex.split(line)) < 2:
            continue
        if any(word in line + " " for word in PARSED_ONLY):
            continue
        words = shlex.split(line)[1:]
        if "--box" in words:
            words[words.index("--box") + 1] = ",".join(map(str, BOX))
        assert cli.main(words) == 0, f"{line}: {capsys.readouterr().err}"
        ran += 1
    assert ran >= 2


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
