"""Where checkpoints lie, and that they are the ones they should be.

`SHA256SUMS` beside this file lists every checkpoint that has a name, a line each as `sha256sum` prints it;
nothing else knows their names or sums. Their files are looked for in this folder (those shipped in the
wheel), in `weights/` of a checkout, and in the cache folder. A new one needs a line there and a model card.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

SHIPPED = Path(__file__).parent
SUMS = SHIPPED / "SHA256SUMS"
_SUFFIX = ".safetensors"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the reason."""


def cache_folder() -> Path:
    """DMV_FAST_CACHE, or else `dmv_fast` in the folder that the platform keeps for caches."""
    if asked := os.environ.get("DMV_FAST_CACHE"):
        return Path(asked).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dmv_fast"


def known() -> dict[str, Path | None]:
    """Every named checkpoint and the file it is loaded from here; None where it has to be fetched first."""
    files = [file for file in _sums() if file.endswith(_SUFFIX)]
    return {file.removesuffix(_SUFFIX): _whereabouts(file) for file in sorted(files)}


def find(name_or_path: str | os.PathLike[str]) -> Path:
    """The file of a name ("dmv18", see `known`) or of a path to a .safetensors file.

    Raises CheckpointError; for a name whose file is not here it says which file to put where.
    """
    text = os.fspath(name_or_path)
    names = known()
    if (named := names.get(text)) is not None:
        return named
    path = Path(text).expanduser()
    if path.is_file():
        return path
    if text in names:
        raise CheckpointError(_how_to_get(text))
    raise CheckpointError(f"weights {text!r}: no such file, and no checkpoint's name ({', '.join(names)})")


def check(path: Path) -> None:
    """Raise CheckpointError unless the file has the sha256 that is known of it.

    Known are those of named checkpoints, in their places, and for any other file what stands in FILE.sha256.
    """
    expected = _expected(path)
    if expected is None:
        return
    found = sha256(path)
    if found != expected:
        raise CheckpointError(
            f"weights {path}: its sha256 is {found}, it should be {expected}: "
            f"cut short, damaged or another version ({path.stat().st_size} bytes); copy it again"
        )


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sums() -> dict[str, str]:
    """File name -> sha256."""
    lines = SUMS.read_text().splitlines() if SUMS.is_file() else []
    return {name: digest for digest, name in (line.split() for line in lines if line.strip())}


def _folders() -> list[Path]:
    """Where named checkpoints may lie, in the order in which they are looked for."""
    root = SHIPPED.parent.parent
    checkout = [root / "weights"] if (root / "pyproject.toml").is_file() else []
    return [SHIPPED, *checkout, cache_folder()]


def _whereabouts(file: str) -> Path | None:
    return next((folder / file for folder in _folders() if (folder / file).is_file()), None)


def _expected(path: Path) -> str | None:
    if path.parent.resolve() in [folder.resolve() for folder in _folders()]:
        if digest := _sums().get(path.name):
            return digest
        if path.parent.resolve() == SHIPPED.resolve():
            raise CheckpointError(f"weights {path}: not listed in {SUMS.name}")
    note = path.with_name(path.name + ".sha256")
    if not note.is_file():
        return None
    words = note.read_text().split()
    if not words:
        raise CheckpointError(f"weights {path}: {note.name} is empty; it should hold the sha256")
    return words[0]


def _how_to_get(name: str) -> str:
    file = name + _SUFFIX
    return (
        f"weights {name!r}: {file} does not come with the installed package. Copy it from the folder "
        f"weights/ of the dmv_fast repository to {cache_folder() / file} (DMV_FAST_CACHE names another "
        f"folder), or give its path. Its sha256 is {_sums()[file]}"
    )
