"""From the CSV files in the results folder: intervals, plots, and the tables in docs/ablations.md."""

from __future__ import annotations

import csv
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.ablations.settings import CANDIDATES, CAPACITIES, COMPARED, INTERVALS, READER, THRESHOLDS
from dmv_fast.files import write_text

RESAMPLES = 10_000
SEED = 0
SETS = ("dev", "held-out")
PAPER_K = {1: (63.6, 87), 2: (62.6, 82), 4: (65.8, 79), 8: (66.6, 72), 16: (68.7, 61), 32: (69.2, 44)}
REMEMBERED = (1, 2, 3, 4, 5)  # frames, of which a later one of a held-out sample is read
READERS = {
    "vote": "vote, renormalised scores (ours)",
    "mlp": "top-k + MLP",
    "softmax": "softmax over all",
    "mean": "mean of the K best (ours)",
    "vote-mean": "vote, and that mean added (ours)",
    "wide": "vote, C = 256 for 64",
    "no-score": "vote, no scores (the paper's words)",
}


def title_of(name: str) -> str:
    """A read's words: of a name as readers.name_of makes them."""
    variant, steps = _parts(name)
    return READERS[variant] + (f", {int(steps):,} steps" if steps else "")


def rival_of(name: str) -> str:
    """The vote that was trained as long."""
    return _trained("vote", _parts(name)[1])


def _trained(variant: str, steps: str) -> str:
    """The name of what `_parts` gives."""
    return f"{variant}-{steps}" if steps else variant


def _parts(name: str) -> tuple[str, str]:
    """Variant, and steps or nothing."""
    found = re.fullmatch(r"(.+?)(?:-(\d+))?", name)
    assert found is not None
    return found[1], found[2] or ""


class Difference(NamedTuple):
    """Mean of paired differences and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Zero lies outside the interval."""
        return self.low > 0 or self.high < 0

    @property
    def verdict(self) -> str:
        """What one may say of the claim that it is positive."""
        return ("yes" if self.mean > 0 else "no, the opposite") if self.clear else "open"

    def __str__(self) -> str:
        star = " \\*" if self.clear else ""
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]{star}"


def paired_difference(those: np.ndarray, base: np.ndarray) -> Difference:
    """those - base, pair by pair (n,): resampled over the pairs, percentile interval, seeded."""
    differences = np.asarray(those) - np.asarray(base)
    rng = np.random.default_rng(SEED)
    means = differences[rng.integers(len(differences), size=(RESAMPLES, len(differences)))].mean(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return Difference(float(differences.mean()), float(low), float(high))


class Measured:
    """sequences.csv: figures by set, setting and sequence."""

    def __init__(self, path: Path):
        self._table: dict[tuple[str, str], dict[str, dict[str, str]]] = defaultdict(dict)
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                if row["auc"] != "nan":
                    self._table[row["dataset"], row["setting"]][row["sequence"]] = row

    def has(self, dataset: str, setting: str) -> bool:
        return (dataset, setting) in self._table

    def settings(self) -> list[str]:
        return list(dict.fromkeys(setting for _, setting in self._table))

    def values(self, dataset: str, setting: str, figure: str = "auc") -> np.ndarray:
        """(n,) a sequence each, in the order of the names."""
        rows = self._table[dataset, setting]
        return np.array([float(rows[name][figure]) for name in sorted(rows)])

    def against(self, dataset: str, setting: str, base: str = "base") -> Difference:
        return paired_difference(self.values(dataset, setting), self.values(dataset, base))

    def cells(self, setting: str, base: str = "base") -> list[str]:
        """AUC and its difference on either set."""
        cells = []
        for dataset in SETS:
            if not self.has(dataset, setting):
                cells += ["-", "-"]
                continue
            mean = self.values(dataset, setting).mean()
            same = setting == base
            cells += [f"{mean:.3f}", "" if same else str(self.against(dataset, setting, base))]
        return cells


def write_report(results: Path, doc: Path) -> None:
    """Tables into `doc` between their markers, plots into `results`."""
    measured = Measured(results / "sequences.csv")
    tables = {
        "memory": memory_table(measured),
        "candidates": candidates_table(measured, results.parent),
        "capacity": capacity_table(measured),
        "terms": terms_table(measured),
        "background": background_table(measured, results / "background.csv"),
    }
    runs = reader_runs(results / "readers.csv") if (results / "readers.csv").is_file() else {}
    if runs:
        tables["readers"] = readers_table(measured, runs) + trained_note(results / "about.json")
        by_frames = {t: reader_runs(results / "readers.csv", f"iou_{t}") for t in REMEMBERED}
        tables["remembered"] = remembered_table(by_frames)
    tables["claims"] = claims_table(measured, runs)
    if others := [name for name in measured.settings() if name.startswith(COMPARED)]:
        tables["checkpoints"] = _table(
            ["checkpoint", *_HEAD],
            [[name.removeprefix(COMPARED), *measured.cells(name, others[0])] for name in others],
        )
    text = doc.read_text(encoding="utf-8")
    for name, table in tables.items():
        text = replace_between(text, name, table)
    write_text(doc, text)
    try:
        from benchmarks.ablations import plots
    except ImportError:
        print("no plots: they need matplotlib (pip install 'dmv-fast[eval]')")
        return
    plots.write_all(measured, results)


def replace_between(text: str, name: str, table: str) -> str:
    """The table takes the place of what stands between `<!-- NAME -->` and `<!-- /NAME -->`."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no markers <!-- {name} --> and <!-- /{name} --> in the page")
    return pattern.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text)


# ---- one function a table ------------------------------------------------------------------------------


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


_HEAD = ["dev AUC", "difference, 95 %", "held-out AUC", "difference, 95 %"]


def memory_table(measured: Measured) -> str:
    rows = [["on (32 frames, every 30)", *measured.cells("base")], ["off", *measured.cells("memory-off")]]
    return _table(["memory", *_HEAD], rows)


def candidates_table(measured: Measured, benchmarks: Path) -> str:
    speeds = bench_fps(benchmarks)
    rows = []
    for k in CANDIDATES:
        ms = np.median(measured.values("dev", f"k-{k}", "median_ms"))
        paper_auc, paper_fps = PAPER_K[k]
        fps = [f"{speed[k]:.0f}" if k in speed else "-" for speed in speeds.values()]
        cells = measured.cells(f"k-{k}", "k-4")
        rows.append([str(k), *cells, f"{ms:.1f}", *fps, f"{paper_auc / 100:.3f}, {paper_fps} FPS"])
    machines = (f"FPS, {machine}" for machine in speeds)
    return _table(["K", *_HEAD, "ms a frame here", *machines, "paper"], rows)


def bench_fps(benchmarks: Path) -> dict[str, dict[int, float]]:
    """machine -> K -> whole frames a second, where `dmv-fast bench --only k` measured them."""
    speeds = {}
    for path in sorted(benchmarks.glob("*/frame.csv")):
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["section"] == "k" and row["fps"]]
        if rows:
            speeds[path.parent.name] = {int(row["k"]): float(row["fps"]) for row in rows}
    return speeds


def capacity_table(measured: Measured) -> str:
    rows = []
    for interval in INTERVALS:
        cells = []
        for capacity in CAPACITIES:
            name = f"capacity-{capacity}-interval-{interval}"
            mean = measured.values("dev", name).mean()
            clear = measured.against("dev", name).clear
            cells.append(f"{mean:.3f}" + (" \\*" if clear else ""))
        rows.append([str(interval), *cells])
    return _table(["interval", *(f"capacity {c}" for c in CAPACITIES)], rows)


TERMS = {
    "base": "as shipped",
    "no-size-penalty": "no penalty on size changes",
    "no-window": "no cosine window",
    "no-smoothing": "no size smoothing",
    "bare-pick": "none of the three",
    **{f"write-{t}": f"written from score {t:g} on (shipped: 0.7)" for t in THRESHOLDS},
    "never-lost": "never taken for lost",
}


def terms_table(measured: Measured) -> str:
    return _table(["setting", *_HEAD], [[text, *measured.cells(name)] for name, text in TERMS.items()])


def background_table(measured: Measured, path: Path) -> str:
    kinds = {"kept": "base", "values": "background-values", "all": "background-all"}
    words = {"kept": "kept", "values": "values zero", "all": "values and keys zero"}
    tracked = [[words[kind], *measured.cells(name)] for kind, name in kinds.items()]
    text = _table(["background in the memory", *_HEAD], tracked)
    if not path.is_file():
        return text
    by_mode = background_figures(path)
    rows = []
    for mode, figures in by_mode.items():
        cells = [words[mode]]
        for column in ("off_target", "on_target", "top_is_target"):
            mean = np.mean(list(figures[column].values()))
            cells.append(f"{mean:.3f}")
            if mode != "kept":
                base = by_mode["kept"][column]
                cells[-1] += f", {paired_difference(list(figures[column].values()), list(base.values()))}"
        rows.append(cells)
    head = ["background", "best score beside the target", "best score on it", "frames with the top on it"]
    return text + "\n\n" + _table(head, rows)


def background_figures(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    """mode -> figure -> sequence -> mean over its frames."""
    values: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            for figure in ("on_target", "off_target", "top_is_target"):
                values[row["mode"]][figure][row["sequence"]].append(float(row[figure]))
    return {
        mode: {f: {s: float(np.mean(v)) for s, v in sorted(by.items())} for f, by in figures.items()}
        for mode, figures in values.items()
    }


def reader_runs(path: Path, figure: str = "iou") -> dict[str, dict[int, np.ndarray]]:
    """readers.csv: name -> seed -> IoU (samples,), NaN where a sample shows no target.

    Names in the order of READERS, longer trained ones behind.
    """
    runs: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            runs[row["variant"]][int(row["seed"])].append(float(row[figure]))
    order = list(READERS)
    names = sorted(runs, key=lambda name: (int(_parts(name)[1] or 0), order.index(_parts(name)[0])))
    return {name: {seed: np.array(iou) for seed, iou in sorted(runs[name].items())} for name in names}


def remembered_table(by_frames: dict[int, dict[str, dict[int, np.ndarray]]]) -> str:
    """IoU on held-out samples by how many frames were remembered: the vote's, and the others' less that."""
    rows = []
    for name in by_frames[REMEMBERED[0]]:
        cells = [_remembered_cell(by_frames[t], name) for t in REMEMBERED]
        rows.append([title_of(name), *cells])
    return _table(["read", *(f"{t} remembered" for t in REMEMBERED)], rows)


def _remembered_cell(runs: dict[str, dict[int, np.ndarray]], name: str) -> str:
    if name == rival_of(name):
        return f"{np.nanmean(list(runs[name].values())):.3f}"
    difference = iou_difference(runs, name, rival_of(name))
    return "-" if difference is None else str(difference)


def readers_table(measured: Measured, runs: dict[str, dict[int, np.ndarray]]) -> str:
    rows = []
    for variant in runs:
        rows.append([title_of(variant), *_iou_cells(runs, variant)])
        for dataset in SETS:
            rows[-1] += _tracked_cells(measured, runs, variant, dataset)
    head = ["read", "seeds", "held-out samples, IoU (each seed)", "difference, 95 %"]
    for dataset in SETS:
        head += [f"{dataset} AUC (each seed)", "difference, 95 %"]
    return _table(head, rows)


def trained_note(path: Path) -> str:
    """A line below the table: whose backbone, how many steps."""
    if not path.is_file():
        return ""
    runs = json.loads(path.read_text(encoding="utf-8"))["readers"].values()
    backbones = sorted({run["checkpoint"]["backbone"][:12] for run in runs})
    steps = ", ".join(str(steps) for steps in sorted({run["steps"] for run in runs}))
    return f"\n\nBackbone of the checkpoint with sha256 {', '.join(backbones)}...; {steps} steps."


def _iou_cells(runs: dict[str, dict[int, np.ndarray]], variant: str) -> list[str]:
    each = " ".join(f"{np.nanmean(v):.3f}" for v in runs[variant].values())
    mean = np.nanmean(list(runs[variant].values()))
    rival = rival_of(variant)
    difference = iou_difference(runs, variant, rival)
    cells = [str(len(runs[variant])), f"{mean:.3f} ({each})"]
    return [*cells, "" if variant == rival or difference is None else str(difference)]


def iou_difference(runs: dict[str, dict[int, np.ndarray]], one: str, other: str) -> Difference | None:
    """Of the IoU on held-out samples, a sample's mean over the seeds that both were trained with."""
    seeds = sorted(set(runs.get(one, ())) & set(runs.get(other, ())))
    if not seeds:
        return None
    those, base = (np.mean([runs[name][seed] for seed in seeds], axis=0) for name in (one, other))
    shown = np.isfinite(base)  # a sample without its target in view is NaN in every run
    return paired_difference(those[shown], base[shown])


def _tracked_cells(measured: Measured, runs: dict, variant: str, dataset: str) -> list[str]:
    tracked = [s for s in _settings_of(runs, variant) if measured.has(dataset, s)]
    if not tracked:
        return ["-", "-"]
    values = [measured.values(dataset, s).mean() for s in tracked]
    cell = f"{np.mean(values):.3f} ({' '.join(f'{v:.3f}' for v in values)})"
    rival = rival_of(variant)
    difference = tracked_difference(measured, runs, variant, rival, dataset)
    return [cell, "" if variant == rival or difference is None else str(difference)]


def _settings_of(runs: dict, variant: str, seeds: set[int] | None = None) -> list[str]:
    return [f"{READER}{variant}-{seed}" for seed in runs.get(variant, ()) if seeds is None or seed in seeds]


def tracked_difference(
    measured: Measured, runs: dict, one: str, other: str, dataset: str
) -> Difference | None:
    """Of the AUC, a sequence's mean over the seeds that both were trained with."""
    seeds = set(runs.get(one, ())) & set(runs.get(other, ()))
    names = [_settings_of(runs, variant, seeds) for variant in (one, other)]
    if not seeds or not all(measured.has(dataset, name) for group in names for name in group):
        return None
    those, base = (np.mean([measured.values(dataset, n) for n in group], axis=0) for group in names)
    return paired_difference(those, base)


def claims_table(measured: Measured, runs: dict) -> str:
    """Each claim, the paper's figure for it and ours; "yes" where the interval lies above zero."""

    def dev(one: str, other: str) -> Difference:
        return measured.against("dev", one, other)

    claims = [
        ("memory on beats off", "+0.048", "dev AUC", dev("base", "memory-off")),
        ("K = 4 beats K = 1", "+0.022", "dev AUC", dev("k-4", "k-1")),
        ("K = 32 beats K = 4", "+0.034", "dev AUC", dev("k-32", "k-4")),
        ("writing every 30th beats every frame", "+0.055", "dev AUC",
         dev("capacity-32-interval-30", "capacity-32-interval-1")),
        ("a capacity of 32 beats 2, every 10th", "+0.015", "dev AUC",
         dev("capacity-32-interval-10", "capacity-2-interval-10")),
        ("background kept beats values zero", "pictures", "dev AUC", dev("base", "background-values")),
        ("background kept beats values and keys zero", "pictures", "dev AUC", dev("base", "background-all")),
    ]  # fmt: skip
    for one, other, text, paper in (
        ("vote", "softmax", "vote beats softmax", "+0.164"),
        ("vote", "mlp", "vote beats top-k + MLP", "+0.087"),
        ("vote", "no-score", "scores carried beat none (ours)", "not tried"),
        ("vote-mean", "vote", "the mean added beats the vote alone (ours)", "not tried"),
    ):
        for steps in sorted({_parts(name)[1] for name in runs}):
            names = [_trained(variant, steps) for variant in (one, other)]
            figures = {"held-out IoU": iou_difference(runs, *names)}
            figures |= {f"{d} AUC": tracked_difference(measured, runs, *names, d) for d in SETS}
            words = f"{text}, {int(steps):,} steps" if steps else text
            claims += [(words, paper, figure, found) for figure, found in figures.items() if found]
    rows = [[text, paper, f"{figure}: {found}", found.verdict] for text, paper, figure, found in claims]
    return _table(["claim", "paper, OTB-100", "here, 95 %", "shown here?"], rows)
