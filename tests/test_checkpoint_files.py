"""The index of a checkpoint's folder is unpickled with the few classes that belong there."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from distsign.checkpoint_files import Reader


class Attribute:
    """Pickled, it is a call of `getattr`, as Python 3.11.0 to 3.11.3 pickle the members of an enumeration."""

    def __init__(self, of: object, name: str) -> None:
        self.of, self.name = of, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.of, self.name)


def index_of(folder: Path, value: object) -> Metadata:
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({}, planner_data=value)))
    return Reader(folder).read_metadata()


def test_members_of_enumerations_are_read_as_every_python_writes_them(tmp_path: Path) -> None:
    member = _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT
    for written in (member, Attribute(_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT")):
        assert index_of(tmp_path, written).planner_data is member


@pytest.mark.parametrize(
    "value",
    [
        Attribute(_MEM_FORMAT_ENCODING, "__init__"),
        Attribute(_MEM_FORMAT_ENCODING, "__class__"),
        Attribute(torch.Size, "__new__"),
        Attribute(Metadata, "__init__"),
        Attribute((), "__class__"),
    ],
)
def test_no_other_attribute_is_reached(tmp_path: Path, value: Attribute) -> None:
    with pytest.raises(pickle.UnpicklingError, match="which no checkpoint does"):
        index_of(tmp_path, value)
