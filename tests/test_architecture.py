"""Imports point down only (DESIGN.md, architecture), read off the source and not off what happens to be imported."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "distsign"

# Each layer may import the ones before it in this list, and nothing else of distsign. A name stands for a module or a
# package with all its modules; inside a package imports are free, but see `test_no_cycles`.
LAYERS: list[set[str]] = [
    {"confidence", "wire", "vote", "agreement", "nest", "registry", "optim_reference", "checkpoint_files", "memory"},
    {"kernels", "digest"},
    {"ballots", "layout"},
    {"sizes"},
    {"payload", "voter", "steering", "ladder"},
    {"owner", "plan", "admission"},
    {"traffic"},
    {"collectives", "exchange_thread"},
    {"statistics", "inspection"},
    {"exchange", "optim", "resharding"},
    {"options", "replicas"},
    {"planner", "vote_memory"},
    {"pipeline"},
    {"hook"},
    {"checkpoint"},
    {"rivals", "robustness"},
    {"simulator"},
    {"study"},
    {"cli"},
    {"__main__"},
    {""},  # distsign/__init__.py, the public names
]
CALLS_COLLECTIVES = {"distsign.collectives", "distsign.simulator.probe"}  # the second times them for `calibrate`
HOOK_MAY_USE = {"GradBucket", "ProcessGroup", "is_available", "is_initialized", "get_rank", "get_world_size"}
# torch.distributed.checkpoint, which calls collectives by itself, and what tells whether there are ranks at all.
CHECKPOINT_MAY_USE = {"checkpoint", "save", "load", "CheckpointException", "Stateful", "DefaultLoadPlanner"} | {
    "FileSystemReader",
    "Metadata",
    "StorageMeta",
    "TensorStorageMetadata",
    "ReadItem",
    "ProcessGroup",
    "is_available",
    "is_initialized",
    "get_rank",
}
NOT_OURS_TO_IMPORT = {"launch", "benchmarks", "tests"}


def modules() -> dict[str, Path]:
    """Return the source of each module of the library, by dotted name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
every_module = pytest.mark.parametrize("name", MODULES)


def tree_of(name: str) -> ast.Module:
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> set[str]:
    """Return what a module imports, wherever it does: `from a import b` as `a.b`, whatever `b` is."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative imports hide where they point"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and called(node) in {"import_module", "__import__"}:
            literal = node.args and isinstance(node.args[0], ast.Constant)
            found.add(str(node.args[0].value) if literal else "<computed>")  # type: ignore[attr-defined]
    return found


def called(node: ast.Call) -> str:
    function = node.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def own_imports(name: str) -> set[str]:
    """Return the modules of the library that a module imports: `a.b` where that is one, else `a`, where it is from."""
    found = {module if module in MODULES else module.rpartition(".")[0] for module in imports(tree_of(name))}
    return {module for module in found if module in MODULES and module != name}


def part(name: str) -> str:
    """Return the module or package directly under the library that a dotted name belongs to."""
    return name.removeprefix(PACKAGE).removeprefix(".").split(".")[0]


def layer(name: str) -> int:
    found = [depth for depth, parts in enumerate(LAYERS) if part(name) in parts]
    assert found, f"{name} has no place in LAYERS of {Path(__file__).name}: say what it may stand on"
    return found[0]


def uses_of_distributed(tree: ast.AST) -> set[str]:
    """Return the names of `torch.distributed` that a module uses; `*` where it passes the module itself around."""
    aliases, found = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("torch.distributed"):
                    found |= set(alias.name.split(".")[2:])
                    if alias.asname:
                        aliases.add(alias.asname)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "torch":
                aliases |= {alias.asname or alias.name for alias in node.names if alias.name == "distributed"}
            elif node.module.startswith("torch.distributed"):
                found |= {alias.name for alias in node.names}
    attributes = {id(node.value): node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        named = isinstance(node, ast.Name) and node.id in aliases and isinstance(node.ctx, ast.Load)
        spelt = (
            isinstance(node, ast.Attribute)
            and node.attr in {"distributed", "_distributed_c10d"}
            and isinstance(node.value, (ast.Name, ast.Attribute))
        )
        if named or spelt:
            found.add(attributes.get(id(node), "*"))
    return found


# ------------------------------------------------------------------------------------------------------------ the rules


def test_there_is_something_to_read() -> None:
    assert {"distsign", "distsign.exchange", "distsign.kernels.cpu", "distsign.wire.header"} <= MODULES.keys()
    assert "distsign.kernels.spans" in own_imports("distsign.kernels.cpu")
    assert "distsign.exchange" in own_imports("distsign.hook")


@every_module
def test_imports_point_down(name: str) -> None:
    for other in own_imports(name):
        if part(other) != part(name):
            assert layer(other) < layer(name), f"{name} may not import {other}"


@every_module
def test_no_cycles(name: str) -> None:
    seen: set[str] = set()
    ahead = list(own_imports(name))
    while ahead:
        module = ahead.pop()
        if module not in seen:
            seen.add(module)
            ahead += own_imports(module)
    assert name not in seen, f"{name} comes back to itself"


@every_module
def test_every_module_has_its_place(name: str) -> None:
    layer(name)


@every_module
def test_the_library_does_not_know_what_is_built_on_it(name: str) -> None:
    found = imports(tree_of(name))
    assert not {module for module in found if module.split(".")[0] in NOT_OURS_TO_IMPORT}
    assert "<computed>" not in found


@every_module
def test_only_one_file_calls_collectives(name: str) -> None:
    if name in CALLS_COLLECTIVES:
        assert "new_group" in uses_of_distributed(tree_of(name)), "else this test looks for the wrong names"
        return
    if part(name) == "rivals" or name == "distsign.simulator.kernel_probe":
        # Buckets to take, and what torch itself has.
        allowed = {"GradBucket", "ProcessGroup", "algorithms", "ddp_comm_hooks", "default_hooks", "powerSGD_hook"}
        assert not uses_of_distributed(tree_of(name)) - allowed
        return
    allowed = HOOK_MAY_USE if part(name) in {"hook", "pipeline", "replicas", "exchange"} else set()
    allowed = CHECKPOINT_MAY_USE if part(name) in {"checkpoint", "checkpoint_files"} else allowed
    found = uses_of_distributed(tree_of(name)) - allowed
    assert not found, f"{name} uses torch.distributed's {', '.join(sorted(found))}: that belongs into collectives.py"


@every_module
def test_the_library_does_not_print(name: str) -> None:
    lines = [
        node.lineno for node in ast.walk(tree_of(name)) if isinstance(node, ast.Name) and node.id in {"print", "pprint"}
    ]
    assert not lines, f"{name} prints in line {lines}: use logging"


def test_kernels_and_wire_stand_alone() -> None:
    """The backends are compiled and the format is fixed without anything else of the library."""
    for name in MODULES:
        if part(name) in {"kernels", "wire", "confidence", "vote"}:
            allowed = {part(name)} | ({"wire"} if part(name) == "kernels" else set())  # the sizes of a sparse body
            assert {part(other) for other in own_imports(name)} <= allowed, name


def test_the_package_has_only_the_public_names() -> None:
    tree = tree_of(PACKAGE)
    kinds = {type(node).__name__ for node in tree.body}
    assert kinds <= {"Expr", "ImportFrom", "Assign"}


# ---------------------------------------------------------------------------------------------- that they can be broken


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch.distributed as dist\ndist.all_reduce(x)", {"all_reduce"}),
        ("import torch.distributed\ntorch.distributed.barrier()", {"barrier"}),
        ("from torch import distributed\ndistributed.broadcast(x)", {"broadcast"}),
        ("from torch import distributed as d\nf = getattr(d, 'send')", {"*"}),
        ("from torch.distributed import all_gather as f\nf(x)", {"all_gather"}),
        ("import torch\ntorch.distributed.new_group()", {"new_group"}),
        ("import torch\ntorch._C._distributed_c10d.Work", {"Work"}),
        ("import torch.distributed.nn.functional as f\nf.all_reduce(x)", {"nn", "functional", "all_reduce"}),
        ("def f():\n    import torch.distributed as dist\n    return dist.ReduceOp", {"ReduceOp"}),
        ("import torch\ntorch.sum(x).distributed_here", set()),
    ],
)
def test_uses_of_distributed_are_found(source: str, found: set[str]) -> None:
    assert uses_of_distributed(ast.parse(source)) == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import distsign.hook", {"distsign.hook"}),
        ("from distsign import hook, vote as v", {"distsign.hook", "distsign.vote"}),
        ("def f():\n    from distsign.hook import sign_vote_hook", {"distsign.hook.sign_vote_hook"}),
        ("from launch import train", {"launch.train"}),
        ("import importlib\nimportlib.import_module('launch.train')", {"importlib", "launch.train"}),
        ("import importlib\nimportlib.import_module(name)", {"importlib", "<computed>"}),
    ],
)
def test_imports_are_found(source: str, found: set[str]) -> None:
    assert imports(ast.parse(source)) == found


def test_a_module_without_a_place_is_noticed() -> None:
    with pytest.raises(AssertionError, match="has no place"):
        layer("distsign.newcomer.inner")
    assert layer("distsign.kernels.cpu") < layer("distsign.voter") < layer("distsign.hook") < layer("distsign")
