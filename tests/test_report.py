"""`dmv-fast report`: what the page says, that it stands alone, and that it works in a real browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from dmv_fast import cli
from dmv_fast.report import filmstrip, page, plots

NAMES = ("easy", "far", "lost", "x<i>&y")

BENCH = """\
section,name,p50_ms,p95_ms,p99_ms,best_ms,fps,frames,note,weights,k,memory,targets
k,K=1,12.848,17.681,20.261,12.180,77.83,20,peak 501 MB,dmv18,1,32,1
k,K=4,13.333,17.941,19.872,12.333,75.00,20,peak 501 MB,dmv18,4,32,1
k,K=32,14.316,19.142,19.479,13.728,69.85,20,peak 501 MB,dmv18,32,32,1
memory,T=1,10.0,11.0,12.0,9.0,100,20,,dmv18,4,1,1
memory,T=32,13.0,14.0,15.0,12.0,77,20,,dmv18,4,32,1
stages,crop K=4,1.0,1.1,1.2,0.9,1000,20,,dmv18,4,32,1
stages,vote K=4,2.0,2.1,2.2,1.9,500,20,,dmv18,4,32,1
peers,kcf,5.0,6.0,7.0,4.0,200,20,,,,,
"""
RETRIEVE = """\
m,n,d,k,what,median_ms
256,8192,256,1,ours,0.61
256,8192,256,4,ours,0.66
256,8192,256,1,plain,14.3
256,8192,256,4,plain,4.4
"""


# ---- an evaluation, from the command to the page ---------------------------------------------------------


def write_sequence(folder: Path, speed: float, visible: int = 12) -> None:
    """12 frames of a patch that moves `speed` pixels a frame; unknown after `visible` frames."""
    rng = np.random.default_rng(0)
    scene = cv2.resize(rng.integers(60, 190, (12, 16, 3), np.uint8), (160, 120))
    patch = cv2.resize(rng.integers(0, 255, (4, 4, 3), np.uint8), (20, 20), interpolation=cv2.INTER_NEAREST)
    (folder / "img").mkdir(parents=True)
    rows = []
    for i in range(12):
        x = round(10 + speed * i) % 130
        frame = scene.copy()
        frame[50:70, x : x + 20] = patch
        cv2.imwrite(str(folder / "img" / f"{i + 1:04d}.jpg"), frame)
        rows.append(f"{x},50,20,20" if i < visible else "NaN,NaN,NaN,NaN")
    (folder / "groundtruth_rect.txt").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """What `dmv-fast eval` leaves of OpenCV's MIL on four made sequences, of which it loses some."""
    folder = tmp_path_factory.mktemp("report")
    for name, speed in zip(NAMES, (1.0, 23.0, 41.0, 2.0), strict=True):
        write_sequence(folder / "secret-place" / name, speed, visible=1 if name == "far" else 12)
    command = ["eval", "otb", "--root", str(folder / "secret-place"), "--tracker", "opencv:mil"]
    assert cli.main([*command, "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def evaluation(run_folder) -> Path:
    assert cli.main(["report", str(run_folder), "--out", str(run_folder / "a.html")]) == 0
    return run_folder / "a.html"


@pytest.fixture(scope="module")
def speed_page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    (folder / "frame.csv").write_text(BENCH)
    (folder / "retrieve.csv").write_text(RETRIEVE)
    (folder / "machine.json").write_text(json.dumps({"processor": "Abacus <9>", "load": [0.5, 1.25]}))
    assert cli.main(["report", str(folder)]) == 0
    return folder / "report.html"


def table_of(text: str) -> list[list[str]]:
    """Cells of the rows of the page's first table."""
    rows = re.findall(r"<tr>(.*?)</tr>", text[text.index("<table") : text.index("</table>")])
    return [re.findall(r"<t[hd][^>]*>(?:<button>)?([^<]*)", row) for row in rows]


def test_the_table_is_that_of_the_run(run_folder, evaluation):
    head, *rows = table_of(evaluation.read_text())
    assert head[:3] == ["Sequence", "Frames", "AUC"] and [row[0] for row in rows][-1] == "mean"
    with open(run_folder / "results.csv", newline="") as file:
        for row, told in zip(rows, csv.DictReader(file), strict=True):
            assert row[0] == told["sequence"].replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            assert row[2] == ("–" if told["auc"] == "" else f"{float(told['auc']):.3f}")


def test_the_page_stands_alone_and_keeps_paths_to_itself(evaluation, speed_page):
    for path in (evaluation, speed_page):
        text = path.read_text()
        assert "default-src 'none'" in text
        assert not re.search(r"(?:src|href)=[\"'](?!data:)", text) and "http" not in text.replace(
            "http-equiv", ""
        )
        assert "@import" not in text and "secret-place" not in text and str(path.parent) not in text
        assert "<i>&y" not in text and "<9>" not in text, "names are text, not HTML"
    assert "x&lt;i&gt;&amp;y" in evaluation.read_text() and "Abacus &lt;9&gt;" in speed_page.read_text()


def test_worst_sequences_come_with_frames(run_folder, evaluation):
    text = evaluation.read_text()
    shown = re.findall(r'<article class="case"><header><h3>(.*?)</h3>', text)
    rows = json.loads((run_folder / "results.json").read_text())["rows"][:-1]
    ranked = sorted((row for row in rows if row["auc"] is not None), key=lambda row: row["auc"])
    assert (
        shown == [row["sequence"].replace("x<i>&y", "x&lt;i&gt;&amp;y") for row in ranked] and len(shown) == 3
    )
    assert text.count("data:image/jpeg;base64,") == 3 * 8
    assert text.count('class="truth"') == text.count('class="predicted"') == 3 * 8 + 1
    assert len(text) < 1 << 20
    cli.main(["report", str(run_folder), "--worst", "1"])
    fewer = (run_folder / "report.html").read_text()
    assert re.findall(r"<h3>(.*?)</h3>", fewer) == shown[:1]


def test_without_the_data_set_the_page_says_so(run_folder, tmp_path, capsys):
    copied = tmp_path / "run"
    shutil.copytree(run_folder, copied)
    (copied / "dataset.json").write_text('{"dataset": "otb", "root": "/nowhere/at/all"}')
    assert cli.main(["report", str(copied)]) == 0
    text = (copied / "report.html").read_text()
    assert "No frames to show" in text and "give --root" in text and "/nowhere" not in text
    moved = str(run_folder.parent / "secret-place")
    assert cli.main(["report", str(copied), "--root", moved]) == 0
    assert "data:image/jpeg" in (copied / "report.html").read_text()


def bad_inputs(folder: Path) -> dict[str, tuple[list[str], str]]:
    run = str(folder / "run")
    return {
        "no folder": ([str(folder / "gone")], "no such folder"),
        "nothing in it": ([str(folder / "empty")], "holds neither results.json"),
        "not JSON": ([str(folder / "broken")], "results.json: not a JSON object"),
        "another JSON": ([str(folder / "other")], "not as `dmv-fast eval` writes it"),
        "no table": ([str(folder / "uneven")], "a.csv: not a table"),
        "suffix": ([run, "--out", "a.pdf"], "must end in .html"),
        "too many": ([run, "--worst", "21"], "--worst must be 0 to 20"),
        "another data set": ([run, "--root", str(folder / "empty")], "empty"),
    }


@pytest.mark.parametrize("name", bad_inputs(Path()))
def test_bad_input_is_one_line_and_leaves_nothing(name, run_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "broken", "other", "uneven"):
        (tmp_path / folder).mkdir()
    (tmp_path / "broken" / "results.json").write_text('{"rows": [')
    (tmp_path / "other" / "results.json").write_text('{"rows": [{}]}')
    (tmp_path / "uneven" / "a.csv").write_text("a,b\n1\n")
    shutil.copytree(run_folder, tmp_path / "run", ignore=shutil.ignore_patterns("*.html"))
    arguments, answer = bad_inputs(tmp_path)[name]
    assert cli.main(["report", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dmv-fast: error: ") and said.count("\n") == 1 and answer in said
    assert not list(tmp_path.rglob("*.html"))


# ---- its parts -------------------------------------------------------------------------------------------


def test_frames_around_the_longest_miss_are_shown():
    iou = np.full(200, 0.8)
    iou[20:23] = 0
    iou[120:180] = 0.05
    chosen = filmstrip.choose_frames(iou, 0)
    assert {0, 119, 120, 199} <= set(chosen) and len(chosen) == 8 and 20 not in chosen
    assert filmstrip.choose_frames(np.full(5, 0.9), 2) == [2, 3, 4]
    assert len(filmstrip.choose_frames(np.full(100, np.nan), 0)) == 8


@pytest.mark.parametrize(
    ("truth", "box"),
    [
        ((10, 10, 20, 20), (600, 440, 20, 20)),
        ((300, 200, 4, 4), (305, 205, 4, 4)),
        ((-30, 470, 50, 50), (np.nan,) * 4),
        ((0, 0, 640, 480), (0, 0, 640, 480)),
    ],
)
def test_a_picture_lies_in_the_frame_and_holds_the_boxes(truth, box):
    left, top, width, height = filmstrip.look_at(640, 480, np.array(truth, float), np.array(box, float))
    assert left >= 0 and top >= 0 and left + width <= 640 and top + height <= 480
    assert abs(width / height - 4 / 3) < 0.06
    for x, y, w, h in (truth, box):
        if np.isfinite(x):
            assert left <= max(x, 0) and top <= max(y, 0)
            assert left + width >= min(x + w, 640) - 1 and top + height >= min(y + h, 480) - 1


def test_ticks_are_round_and_hold_the_values():
    for low, high in ((0, 1), (0, 20.3), (3, 1100), (0, 0.037), (5, 5)):
        ticks = plots._round_steps(low, high)
        assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8


def test_what_was_not_measured_is_a_dash():
    assert [page.cell(value, 2) for value in (None, "", float("nan"), 0, 1234.5)] == ["–"] * 3 + [
        "0.00",
        "1,234.50",
    ]
    drawn = plots.line_plot(
        "t", [plots.Line("a", [(0, 1), (1, float("nan"))])], plots.Axis("x"), plots.Axis("y")
    )
    assert "nan" not in drawn and plots.line_plot("t", [], plots.Axis("x"), plots.Axis("y")) == ""


def test_a_benchmark_becomes_plots_and_tables(speed_page):
    text = speed_page.read_text()
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert captions == [
        "Latency of a frame against K",
        "Latency of a frame against memory",
        "Where a frame&#x27;s time goes",
        "Retrieval, M 256, N 8192, D 256",
    ]
    assert text.count("<polyline") == 3 + 3 + 2 and text.count('<rect class="bar') == 2
    assert text.count("<table") == 2 and "Abacus" in text


# ---- in a browser ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator:
    """A headless Chromium that tells what its console was told."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="the package selenium is not installed")
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("needs Chromium and its driver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    quiet = "background-networking component-update sync quic gpu".split()
    for flag in ("headless", "no-sandbox", "no-first-run", *(f"disable-{name}" for name in quiet)):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chromium = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chromium
    chromium.quit()


def open_page(browser, path: Path, width: int = 1280) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(path.as_uri())
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(("kind", "figures"), [("evaluation", 3), ("speed_page", 4)])
def test_plots_are_seen_and_nothing_overflows(browser, request, kind, figures, width):
    open_page(browser, request.getfixturevalue(kind), width)
    sizes = browser.execute_script(
        """return [...document.querySelectorAll(".plot svg")].map(svg => {
            const box = svg.getBoundingClientRect(), line = svg.querySelector("polyline, .bar");
            const drawn = line.getBoundingClientRect(), style = getComputedStyle(line);
            return [box.width, box.height, drawn.width, style.stroke !== "none" || style.fill !== "none"];
        })"""
    )
    assert len(sizes) == figures
    for across, down, drawn, coloured in sizes:
        assert across > 250 and down > 80 and drawn > 20 and coloured
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.get_log("browser") == []


def test_pictures_of_the_strips_are_seen(browser, evaluation):
    open_page(browser, evaluation)
    sizes = browser.execute_async_script(
        """const done = arguments[0];
        Promise.all([...document.querySelectorAll(".film image")].map(async image => {
            const copy = new Image();
            copy.src = image.getAttribute("href");
            await copy.decode();
            return [copy.naturalWidth, image.getBoundingClientRect().width];
        })).then(done)"""
    )
    assert len(sizes) == 24 and all(own == 320 and shown > 100 for own, shown in sizes)


def column_of(browser, number: int) -> list[str]:
    return browser.execute_script(
        """const rows = document.querySelector("table").tBodies[0].rows;
        return [...rows].map(row => row.cells[arguments[0]].textContent)""",
        number,
    )


def test_heads_sort_the_table_by_mouse_and_keyboard(browser, evaluation):
    from selenium.webdriver.common.keys import Keys

    open_page(browser, evaluation)
    buttons = browser.find_elements("css selector", "thead button")
    heads = browser.find_elements("css selector", "thead th")
    assert column_of(browser, 0) == sorted(NAMES), "as the run has them"
    assert column_of(browser, 2)[1] == "–"
    measured = sorted(float(value) for value in column_of(browser, 2) if value != "–")
    buttons[2].click()
    assert [float(value) for value in column_of(browser, 2)[:3]] == measured
    assert column_of(browser, 0)[3] == "far", "not measured: at the end"
    assert [head.get_attribute("aria-sort") for head in heads[:3]] == ["none", "none", "ascending"]
    buttons[2].send_keys(Keys.ENTER)
    assert [float(value) for value in column_of(browser, 2)[:3]] == measured[::-1]
    assert heads[2].get_attribute("aria-sort") == "descending" and column_of(browser, 0)[3] == "far"
    buttons[0].click()
    buttons[0].click()
    assert column_of(browser, 0) == sorted(NAMES, reverse=True)
    foot = browser.execute_script("return document.querySelector('tfoot th').textContent")
    assert foot == "mean", "the mean stays where it is"
    assert browser.get_log("browser") == []
