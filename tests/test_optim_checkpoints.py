"""Every optimizer saved, loaded and copied: it goes on as if nothing had been, or refuses what is not its own."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from distsign.confidence import AdaptiveConfidence, FixedConfidence, RMSConfidence
from distsign.optim import SignAdamPP
from distsign.optim.base import SignOptimizer
from tests.optim_cases import (
    LR,
    assert_same,
    bits,
    build,
    every_variant,
    make_params,
    train,
)


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stop", [0, 7])
def test_resume_equals_unbroken(name: str, dtype: torch.dtype, stop: int) -> None:
    """torch casts loaded state to the parameter's dtype, which would round the averages and the statistics."""
    unbroken = make_params(dtype)
    optimizer = build(name, unbroken)
    train(optimizer, unbroken, range(stop))
    weights = [p.detach().clone() for p in unbroken]
    checkpoint = saved_and_loaded(optimizer.state_dict())
    train(optimizer, unbroken, range(stop, 15))

    resumed = [nn.Parameter(weight) for weight in weights]
    other = build(name, resumed, lr=0.9)
    other.load_state_dict(checkpoint)
    train(other, resumed, range(stop, 15))
    assert_same(bits(other), bits(optimizer))
    assert saved_and_loaded(other.state_dict())["param_groups"] == optimizer.state_dict()["param_groups"]


@every_variant
def test_a_loaded_state_is_a_copy(name: str) -> None:
    params = make_params()
    optimizer = build(name, params)
    train(optimizer, params, range(2))
    checkpoint = optimizer.state_dict()
    before = copy.deepcopy(checkpoint["state"])
    copied = make_params(seed=1)
    other = build(name, copied)
    other.load_state_dict(checkpoint)
    train(other, copied, range(2, 4))
    for key, entries in before.items():
        for name_, value in entries.items():
            assert torch.equal(checkpoint["state"][key][name_], value)


@every_variant
@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_copies_go_on_alike(name: str, how: Callable[[SignOptimizer], SignOptimizer]) -> None:
    params = make_params(torch.bfloat16)
    optimizer = build(name, params)
    train(optimizer, params, range(3))
    twin = how(optimizer)
    twins = twin.param_groups[0]["params"]
    assert twins[0] is not params[0]
    train(optimizer, params, range(3, 6))
    train(twin, twins, range(3, 6))
    assert_same(bits(twin), bits(optimizer))
    twin.load_state_dict(optimizer.state_dict())


def test_hooks_of_the_user_see_what_is_loaded_and_what_was() -> None:
    params = make_params(torch.bfloat16)
    optimizer = SignAdamPP(params, lr=LR, confidence=FixedConfidence(0.5))
    train(optimizer, params, range(2))
    seen: list[Any] = []

    def rename(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state = {k: {"momentum_buffer": v["old_name"]} for k, v in state_dict["state"].items()}
        return {**state_dict, "state": state}

    checkpoint = optimizer.state_dict()
    checkpoint["state"] = {k: {"old_name": v["momentum_buffer"]} for k, v in checkpoint["state"].items()}
    optimizer.register_load_state_dict_pre_hook(rename)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[params[0]]["momentum_buffer"].dtype))
    optimizer.register_state_dict_post_hook(lambda o, d: seen.append(d["param_groups"][0]["confidence"]))
    optimizer.load_state_dict(checkpoint)
    optimizer.state_dict()
    assert seen == [torch.float32, "FixedConfidence(alpha=0.5)"]
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1


def test_foreign_checkpoints_are_refused() -> None:
    params = make_params()
    optimizer = SignAdamPP(params, lr=LR)
    train(optimizer, params, range(2))
    before = bits(optimizer)

    def refuse(checkpoint: dict[str, Any], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(checkpoint)
        assert_same(bits(optimizer), before)
        assert optimizer.param_groups[0]["lr"] == LR
        assert not optimizer._optimizer_load_state_dict_pre_hooks

    refuse(torch.optim.Adam(params).state_dict(), "another optimizer")
    refuse(SignAdamPP(params[:3]).state_dict(), r"groups of \[3\] parameters, this optimizer of \[6\]")
    other = make_params()
    other[0] = nn.Parameter(torch.zeros(4))
    smaller = SignAdamPP(other)
    train(smaller, other, [0])
    refuse(smaller.state_dict(), "another model")
    other = make_params()
    adaptive = SignAdamPP(other, confidence=AdaptiveConfidence())
    train(adaptive, other, [0])
    refuse(adaptive.state_dict(), r"written with confidence=AdaptiveConfidence\(.*this optimizer has None")
    wrong = optimizer.state_dict()
    wrong["param_groups"][0]["momentum"] = 2.0
    refuse(wrong, r"momentum must be in \[0, 1\), got 2\.0")


def test_another_confidence_of_the_same_kind_is_refused() -> None:
    """Shapes would fit, but a carry in units of k = 3 means nothing to k = 24, nor does a warm-up."""
    params, others = make_params(), make_params()
    optimizer, other = build("pp-carry", params), build("pp-carry", others, confidence=RMSConfidence(k=24))
    train(optimizer, params, range(2))
    with pytest.raises(ValueError, match=r"confidence=RMSConfidence\(k=3, .* has RMSConfidence\(k=24, .*build it with"):
        other.load_state_dict(optimizer.state_dict())
