"""Which code a result is of: the commit, and what was changed since; or the installed package's version."""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
from pathlib import Path

__all__ = ["code_version"]

_SOURCES = ":(glob)**/*.py"


def code_version(file: Path) -> str:
    """Return the version of the code that a source file belongs to.

    Args:
        file: of the program.

    Returns:
        The commit's first twelve digits where the file is in a Git checkout, with `+` and a digest of the changes where
        Python files differ from that commit (so that two states of changed code are two versions); else `distsign`
        and the package's version.

    Example:
        >>> code_version(Path("/absent/train.py")).startswith("distsign ")
        True
    """
    folder = file.parent
    # A file that Git does not track may only lie within somebody's checkout, as in a virtual environment.
    if _git(folder, "ls-files", "--error-unmatch", file.name) is None:
        return f"distsign {importlib.metadata.version('distsign')}"
    commit, top = _git(folder, "rev-parse", "HEAD"), _git(folder, "rev-parse", "--show-toplevel")
    if commit is None or top is None:  # no commit yet
        commit, top = b"uncommitted", str(folder).encode()
    root = Path(top.decode().strip())
    changes = hashlib.sha256(_git(root, "diff", "HEAD", "--", _SOURCES) or b"")
    is_clean = changes.digest() == hashlib.sha256(b"").digest()
    for name in (_git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", _SOURCES) or b"").split(b"\0"):
        if name:
            is_clean = False
            changes.update(name + b"\0" + (root / name.decode()).read_bytes())
    return commit.decode().strip()[:12] + ("" if is_clean else f"+{changes.hexdigest()[:8]}")


def _git(folder: Path, *arguments: str) -> bytes | None:
    """Return what git says; None where it fails or is not there."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
