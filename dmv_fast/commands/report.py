"""`dmv-fast report`: an evaluation or a benchmark as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

_MOST_WORST = 20  # strips of eight pictures: 3 MB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Folder, page, and where the frames of an evaluation are."""
    parser.add_argument(
        "folder", type=Path, metavar="RUN", help="what `dmv-fast eval` or `bench --out` wrote"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="the page (default: RUN/report.html)")
    parser.add_argument("--root", type=Path, metavar="DIR", help="the data set's folder, if it was moved")
    parser.add_argument("--dataset", help="and its kind, as `dmv-fast eval` has it (auto)")
    parser.add_argument(
        "--worst", type=int, default=5, metavar="N", help="sequences to show frames of, lowest AUC first (5)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the page. Bad input is a ValueError."""
    out = args.out or args.folder / "report.html"
    if not args.folder.is_dir():
        raise ValueError(f"RUN is {str(args.folder)!r}; no such folder")
    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out must end in .html, not {str(out)!r}")
    if not 0 <= args.worst <= _MOST_WORST:
        raise ValueError(f"--worst must be 0 to {_MOST_WORST}, not {args.worst}")
    from dmv_fast.files import write_text
    from dmv_fast.report.benchmark import benchmark_page
    from dmv_fast.report.evaluation import evaluation_page

    if (args.folder / "results.json").is_file():
        page = evaluation_page(args.folder, args.dataset, args.root, args.worst)
    elif any(args.folder.glob("*.csv")):
        page = benchmark_page(args.folder)
    else:
        raise ValueError(
            f"{args.folder}: holds neither results.json (of `dmv-fast eval`) nor a .csv (of `bench`)"
        )
    write_text(out, page)
    print(f"wrote {out} ({len(page.encode()) / 2**20:.1f} MB)")
    return 0
