"""`dmv-fast export`: the network for other runtimes."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to, and which network."""
    parser.add_argument(
        "--onnx", type=Path, required=True, metavar="DIR", help="folder for the graphs and dmv.json"
    )
    parser.add_argument("--weights", default="dmv18", help="a shipped network or a file (dmv18)")
    parser.add_argument("-k", "--k", type=int, metavar="K", help="candidates a location (the network's own)")


def run(args: argparse.Namespace) -> int:
    """Export and check; 0 when onnxruntime computes what PyTorch does."""
    from dmv_fast import weights
    from dmv_fast.export import DESCRIPTION, GRAPHS, export_onnx

    path = weights.find(args.weights)
    source = {"weights": path.stem, "sha256": weights.sha256(path)}
    differences = export_onnx(weights.load_model(args.weights), args.onnx, k=args.k, source=source)
    for name in GRAPHS:
        file = args.onnx / f"{name}.onnx"
        size = file.stat().st_size / 1e6
        print(f"{file}: {size:.1f} MB, onnxruntime is within {differences[name]:.1e} of PyTorch")
    print(args.onnx / DESCRIPTION)
    return 0
