"""The simulator's models: real shapes, and buckets as DDP forms them."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from distsign.simulator import Model, load_model
from launch.models import LeNet

SIZES = {
    "lenet": 61_706,
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "vgg19": 143_667_240,
    "bert-base": 109_482_240,
    "gpt2-small": 124_439_808,
    "llama-7b": 6_738_415_616,
}


@pytest.mark.parametrize("name", SIZES)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    assert load_model(name).num_elements == SIZES[name]


def test_lenet_is_that_of_the_tasks() -> None:
    shapes = [(name, tuple(p.shape)) for name, p in LeNet().named_parameters()]
    assert [(p.name, p.shape) for p in load_model("lenet").parameters] == shapes


def test_names_of_parameters_are_unique() -> None:
    for name in SIZES:
        names = [p.name for p in load_model(name).parameters]
        assert len(set(names)) == len(names)


@given(
    st.lists(st.integers(0, 400_000), min_size=1, max_size=20).filter(any),
    st.sampled_from([None, 0.01, 0.5, 1.0, 4.0]),
)
def test_buckets_are_those_of_torch(sizes: list[int], bucket_mb: float | None) -> None:
    """DDP gives the gradients' sizes in the order in which they come, reversed, once it rebuilds its buckets."""
    tensors = [torch.empty(n, device="meta") for n in reversed(sizes)]
    limits = [1 << 20, 25 << 20] if bucket_mb is None else [int(bucket_mb * (1 << 20))]
    indices = list(range(len(sizes)))
    wanted, _ = dist._compute_bucket_assignment_by_size(tensors, limits, [False] * len(sizes), indices)
    found = Model.of(sizes).buckets(bucket_mb)
    assert [[len(sizes) - 1 - row for row in bucket.rows] for bucket in found] == wanted
    assert sum(bucket.num_elements for bucket in found) == sum(sizes)
    ready = [bucket.ready for bucket in found]
    assert ready == sorted(ready)
    assert ready[-1] == pytest.approx(1)


def test_sizes_module_and_function(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [p.num_elements for p in load_model("3*10,7").parameters] == [10, 10, 10, 7]
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    net[0].bias.requires_grad_(False)
    assert Model.of(net).num_elements == 12 + 20 + 5
    module = types.ModuleType("some_module")
    module.make = lambda: nn.Linear(10, 10)  # type: ignore[attr-defined]
    module.shapes = lambda: [(3, 4), 5]  # type: ignore[attr-defined]
    module.wrong = lambda: 3.5  # type: ignore[attr-defined]
    module.value = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "some_module", module)
    assert load_model("some_module:make").num_elements == 110
    assert load_model("some_module:shapes").num_elements == 17
    for text, words in (
        ("some_module:wrong", "returned float"),
        ("some_module:value", "is no function"),
        ("some_module:absent", "cannot find the model"),
        ("absent_module:f", "cannot find the model"),
        ("3*", "cannot read the sizes"),
        ("0,0", "has no parameters"),
    ):
        with pytest.raises(ValueError, match=words):
            load_model(text)


def test_a_model_of_torchvision_is_built_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    models = types.SimpleNamespace(
        list_models=lambda: ["wide"], get_model=lambda name, weights: nn.Linear(1 << 20, 1 << 20)
    )
    zoo = types.ModuleType("torchvision")
    zoo.models = models  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", zoo)
    monkeypatch.setattr("distsign.simulator.models.find_spec", lambda name: name == "torchvision" or None)
    assert load_model("wide").num_elements == (1 << 40) + (1 << 20)
    with pytest.raises(ValueError, match="did you mean resnet50"):
        load_model("resnet51")
