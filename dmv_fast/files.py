"""Files that are there whole or not at all: a reader, or a run cut short, never meets half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def partial_path(target: Path) -> Path:
    """The hidden name beside `target` under which it is written until it is whole."""
    return target.with_name(f".{target.stem}.{os.getpid()}.part{target.suffix}")


def check_target(target: str | os.PathLike[str]) -> Path:
    """The path of a file that can be written; an OSError of the fitting kind if it cannot."""
    path = Path(target)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, not a file to write")
    if path.exists() and not path.is_file():  # /dev/null: it would be replaced by a file
        raise OSError(f"{path}: is a device, pipe or socket, not a file to write")
    if path.is_symlink():  # what it points to is replaced, not the link
        path = path.resolve()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path}: the folder {path.parent} is not writable")
    return path


@contextmanager
def replaced_when_complete(
    target: str | os.PathLike[str], *, keep_interrupted: bool = False
) -> Iterator[Path]:
    """Yield a temporary path beside `target`; rename it to `target` at the end of the block.

    If the block raises, the temporary file goes and a former `target` stays. keep_interrupted: Ctrl-C
    (KeyboardInterrupt) keeps what has been written so far, for outputs that are of use when cut short.
    An OSError of the fitting kind if `target` cannot be written.
    """
    path = check_target(target)
    partial = partial_path(path)
    try:
        yield partial
        os.replace(partial, path)
    except KeyboardInterrupt:
        if keep_interrupted and partial.exists():
            os.replace(partial, path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8; its folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced_when_complete(path) as partial:
        partial.write_text(text, encoding="utf-8")
