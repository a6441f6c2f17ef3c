"""Files that are there whole or not at all: a reader, or a run cut short, never meets half of one."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a full disk says
_LONGEST = 100  # characters of the target's name in the temporary one's


def partial_path(target: Path, *, keep_suffix: bool = False) -> Path:
    """A new hidden name beside `target`, under which it is written until it is whole.

    It ends in .part, or, for writers that go by the ending (OpenCV's), as `target` does.
    """
    name, ending = f".{target.name[:_LONGEST]}.{secrets.token_hex(4)}.part", target.suffix
    return (target.parent / (name + ending if keep_suffix else name)).absolute()


def check_target(target: str | os.PathLike[str]) -> Path:
    """The path of a file that a user named to be written; an OSError of the fitting kind if it cannot.

    Of a symbolic link it is where that points to: the file is replaced, not the link.
    """
    path = Path(target)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder, not a file to write")
    if path.exists() and not path.is_file():  # /dev/null: it would be replaced by a file
        raise OSError(f"{path}: is a device, pipe or socket, not a file to write")
    if path.is_symlink():
        path = Path(os.path.realpath(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path}: the folder {path.parent} is not writable")
    return path


@contextmanager
def replaced_when_complete(
    target: Path, *, keep_suffix: bool = False, keep_interrupted: bool = False
) -> Iterator[Path]:
    """Yield a `partial_path` of `target`; it gets the target's name at the end of the block.

    If the block raises, the temporary file goes and a former `target` stays. keep_interrupted: Ctrl-C
    (KeyboardInterrupt) keeps what has been written so far, for outputs that are of use when cut short. An
    OSError of a full disk names the target.
    """
    path = target.absolute()  # the block may change folder
    partial = partial_path(path, keep_suffix=keep_suffix)
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        if error.filename is None and error.errno in NO_ROOM:  # of a write: it knows the open file alone
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
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
