"""The `dmv-fast` command: finds the subcommand, and turns bad input into one line.

Each subcommand is a module with `add_arguments(parser)` and `run(args) -> int` (the exit code), imported only
when it is asked for: `dmv-fast --help` loads neither torch nor OpenCV. Exit codes: 0 done, 1 a fault of ours,
2 bad input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

import dmv_fast

_COMMANDS = {
    "track": ("dmv_fast.commands.track", "follow one target through a video, images or a camera"),
    "doctor": ("dmv_fast.commands.doctor", "say what works on this machine, and why the rest does not"),
    "preview": ("dmv_fast.commands.preview", "show the samples that a recipe trains on"),
    "train": ("dmv_fast.commands.train", "train a network by a recipe"),
    "eval": ("dmv_fast.commands.eval", "measure a tracker on a dataset"),
    "calibration": ("dmv_fast.commands.calibration", "compare an evaluation's scores with its overlaps"),
    "bench": ("dmv_fast.commands.bench", "time a frame on this machine"),
    "report": ("dmv_fast.commands.report", "an evaluation or a benchmark as one HTML page"),
    "annotate": ("dmv_fast.commands.annotate", "follow a target in each of many videos"),
    "export": ("dmv_fast.commands.export", "write the network as ONNX graphs"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"dmv-fast: error: {message} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(f"dmv-fast {dmv_fast.__version__}")
        parser.exit()


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dmv-fast` with these arguments (default: the process's own) and return the exit code."""
    argv = _join_box(sys.argv[1:] if argv is None else argv)
    _mend_streams()
    if "--debug" in argv:
        return _run(argv)
    # OpenCV and FFmpeg would print lines of their own beside our one.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            return _run(argv)
    except (ValueError, OSError, ImportError) as error:
        _say("error", str(error) or type(error).__name__)
        return 2
    except Exception as error:
        _say("error", f"{type(error).__name__}: {error} (--debug shows where)")
        return 1


def _run(argv: Sequence[str]) -> int:
    try:
        args, unknown = _parser(argv).parse_known_args(argv)
        if unknown:  # parse_args would point to the help of `dmv-fast`, which lists no command's options
            args.command.error(f"unrecognized arguments: {' '.join(unknown)}")
        code = args.run(args)
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse: --help, or a bad argument already reported
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output (`| head`) has gone; flush to nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="dmv-fast", description="DMV: track one target by a memory of deep features.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    asked = next((word for word in argv if not word.startswith("-")), None)
    for name, (module_name, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        if name == asked:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
            command.set_defaults(run=module.run, command=command)
            command.add_argument("--debug", action="store_true", help="show tracebacks and every message")
    return parser


def _join_box(argv: Sequence[str]) -> list[str]:
    """`--box -5,1,9,9` -> `--box=-5,1,9,9`: argparse takes a value with a leading minus for an option."""
    joined: list[str] = []
    for word in argv:
        if joined and joined[-1] == "--box" and word[:1] == "-" and word[1:2] in "0123456789." and word[1:]:
            joined[-1] = f"--box={word}"
        else:
            joined.append(word)
    return joined


def _mend_streams() -> None:
    """Closed ones (`>&-`, a service) take what is said to nowhere; a name that one cannot show is escaped."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for the process's life)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _say(kind: str, message: str) -> None:
    from tqdm import tqdm

    tqdm.write(f"dmv-fast: {kind}: {' '.join(message.split())}", file=sys.stderr)  # beside a progress bar too


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _say("warning", str(message))
