"""Rows and names of parameters, and the guard of a gradient that holds a verdict."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn

from distsign.registry import ParameterRegistry, VoteError


def parameters(*sizes: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(size)) for size in sizes]


# ------------------------------------------------------------------------------------------------------ rows and names


def test_rows_follow_the_order_of_track_whatever_is_seen_later() -> None:
    a, b, c = parameters(1, 2, 3)
    registry = ParameterRegistry()
    registry.track([("a", a), ("b", b), ("c", c)])
    assert [registry.see(p) for p in (c, a, b, c)] == [2, 0, 1, 2]
    assert registry.names() == {"a": 0, "b": 1, "c": 2}
    assert [registry.num_elements(row) for row in range(3)] == [1, 2, 3]
    assert len(registry) == 3


def test_rows_follow_first_sight_until_tracked() -> None:
    a, b, c = parameters(1, 2, 3)
    registry = ParameterRegistry()
    assert [registry.see(p) for p in (c, b)] == [0, 1]
    registry.track([("a", a), ("b", b), ("c", c)])
    assert registry.names() == {"a": 2, "b": 1, "c": 0}
    assert registry.see(a) == 2


def test_equal_parameters_have_rows_of_their_own() -> None:
    registry = ParameterRegistry()
    a, b = parameters(4, 4)
    assert (registry.see(a), registry.see(b)) == (0, 1)


def test_parameters_without_gradient_are_left_out() -> None:
    a, b = parameters(1, 2)
    a.requires_grad_(False)
    registry = ParameterRegistry()
    registry.track([("a", a), ("b", b)])
    assert registry.names() == {"b": 0}


def test_track_twice_is_fine() -> None:
    net = nn.Linear(2, 2)
    registry = ParameterRegistry()
    registry.track(net.named_parameters())
    registry.track(net.named_parameters())
    assert registry.names() == {"weight": 0, "bias": 1}


def test_two_parameters_of_one_name_are_refused() -> None:
    registry = ParameterRegistry()
    registry.track(nn.Linear(2, 2).named_parameters())
    with pytest.raises(ValueError, match=r"two parameters are named 'weight': .*one state a model"):
        registry.track(nn.Linear(2, 2).named_parameters())


def test_names_that_are_missing_are_said() -> None:
    registry = ParameterRegistry()
    with pytest.raises(ValueError, match=r"^all parameters .*state\.track\(model\.named_parameters\(\)\)"):
        registry.names()
    a, b, c = parameters(1, 2, 3)
    for parameter in (a, b, c):
        registry.see(parameter)
    with pytest.raises(ValueError, match="^3 parameters of this SignVoteState have no name"):
        registry.names()
    registry.track([("a", a)])
    with pytest.raises(ValueError, match="^2 parameters"):
        registry.names()


# --------------------------------------------------------------------------------------------------------------- guard


class Watched:
    """A small net whose parameters a registry has seen, as the hook does it."""

    def __init__(self, *, names: bool = True) -> None:
        self.net = nn.Linear(3, 2)
        self.registry = ParameterRegistry()
        if names:
            self.registry.track(self.net.named_parameters())
        self.rows = [self.registry.see(parameter) for parameter in self.net.parameters()]

    def backward(self) -> None:
        self.net(torch.ones(1, 3)).sum().backward()

    def vote(self) -> None:
        """Put a verdict in the place of the gradient."""
        for parameter in self.net.parameters():
            assert parameter.grad is not None
            parameter.grad.sign_()
        self.registry.mark_verdicts(self.rows)

    def grads(self) -> list[Tensor]:
        return [parameter.grad.clone() for parameter in self.net.parameters() if parameter.grad is not None]


def test_a_second_backward_into_a_verdict_is_refused() -> None:
    watched = Watched()
    watched.backward()
    watched.vote()
    before = watched.grads()
    with pytest.raises(VoteError, match=r"parameter (weight|bias), whose \.grad still holds .*zero_grad.*no_sync"):
        watched.backward()
    assert all(torch.equal(a, b) for a, b in zip(watched.grads(), before, strict=True)), "and nothing was added"
    with pytest.raises(VoteError):
        watched.backward()


def test_a_parameter_without_a_name_is_said_by_its_shape() -> None:
    watched = Watched(names=False)
    watched.backward()
    watched.vote()
    with pytest.raises(VoteError, match=r"a parameter of shape \((2, 3|2,)\), whose .*no_sync\(\)$"):
        watched.backward()


@pytest.mark.parametrize("cleared", [True, False])
def test_names_of_another_net_are_noticed_at_the_second_backward(cleared: bool) -> None:
    """Its optimizer clears no gradient here; and where the user does, nothing would ever be trained."""
    watched = Watched(names=False)
    watched.registry.track(nn.Linear(3, 2).named_parameters())
    watched.backward()
    watched.vote()
    if cleared:
        watched.net.zero_grad()
    with pytest.raises(VoteError, match=r"none of the parameters .*model\.named_parameters\(\) of the model that DDP"):
        watched.backward()


def test_a_verdict_that_no_optimizer_with_this_state_has() -> None:
    watched = Watched(names=False)
    watched.registry.track([("weight", watched.net.weight)])
    watched.backward()
    watched.vote()
    watched.net.weight.grad = None
    with pytest.raises(VoteError, match=r"of shape \(2,\).*No optimizer with vote_state=state has this parameter"):
        watched.backward()


def test_a_gradient_that_was_not_voted_on_has_no_row() -> None:
    watched, other = Watched(), Watched(names=False)
    other.backward()
    watched.registry.track([("alien", other.net.bias), ("unused", nn.Parameter(torch.ones(2)))])
    assert watched.registry.row(watched.net.weight) == 0
    with pytest.raises(VoteError, match=r"has not voted on, of parameter alien: build the optimizer from"):
        watched.registry.row(other.net.bias)
    with pytest.raises(VoteError, match=r"has not voted on, of a parameter of shape \(2, 3\)"):
        watched.registry.row(other.net.weight)
    other.net.bias.grad = None  # frozen or unused
    assert watched.registry.row(other.net.bias) == 2


def test_no_gradient_is_refused_before_the_hook_has_run() -> None:
    net, registry = nn.Linear(3, 2), ParameterRegistry()
    registry.track(net.named_parameters())
    net(torch.ones(1, 3)).sum().backward()
    assert [registry.row(parameter) for parameter in net.parameters()] == [0, 1]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_clears_the_guard(set_to_none: bool) -> None:
    watched = Watched()
    for _ in range(3):
        watched.backward()
        watched.vote()
        torch.optim.SGD(watched.net.parameters(), lr=0.1).zero_grad(set_to_none=set_to_none)
    watched.backward()
    first = watched.grads()
    watched.backward()  # what no_sync does: these are gradients again
    assert all(torch.equal(2 * a, b) for a, b in zip(first, watched.grads(), strict=True))


def test_gradients_may_add_up_before_there_is_a_verdict() -> None:
    watched = Watched()
    watched.backward()
    watched.backward()
    watched.vote()


def test_a_verdict_of_abstentions_does_no_harm() -> None:
    """A gradient that is added to zeros is a gradient."""
    watched = Watched()
    watched.backward()
    for parameter in watched.net.parameters():
        assert parameter.grad is not None
        parameter.grad.zero_()
    watched.registry.mark_verdicts(watched.rows)
    watched.backward()
    assert all(grad.any() for grad in watched.grads())


def test_a_poisoned_gradient_is_no_gradient_either() -> None:
    watched = Watched()
    watched.backward()
    for parameter in watched.net.parameters():
        assert parameter.grad is not None
        parameter.grad.fill_(float("nan"))
    watched.registry.mark_verdicts(watched.rows)
    with pytest.raises(VoteError):
        watched.backward()


def test_only_what_was_voted_on_is_guarded() -> None:
    """A parameter that is frozen or unused keeps out of it, and so do other models."""
    watched, other = Watched(), Watched()
    for each in (watched, other):
        each.backward()
    watched.registry.mark_verdicts([0])  # the weight
    other.backward()
    watched.net.weight.requires_grad_(False)
    watched.backward()
    assert watched.net.bias.grad is not None and watched.net.bias.grad.eq(2).all()


def test_seeing_a_parameter_often_watches_it_once() -> None:
    parameter = nn.Parameter(torch.ones(2))
    registry = ParameterRegistry()
    looks = []
    registry._check_accumulation = looks.append
    for _ in range(5):
        registry.see(parameter)
    parameter.sum().backward()
    assert looks == [0]
    torch.autograd.grad(parameter.sum(), parameter)
    assert looks == [0], "nothing was added to .grad"


def test_a_registry_that_is_gone_guards_nothing_and_is_not_kept_alive() -> None:
    watched = Watched()
    watched.backward()
    watched.vote()
    gone = weakref.ref(watched.registry)
    del watched.registry
    gc.collect()
    assert gone() is None
    watched.backward()


def test_a_watched_net_can_be_copied_and_pickled() -> None:
    watched = Watched()
    watched.backward()
    watched.vote()
    for twin in (copy.deepcopy(watched.net), pickle.loads(pickle.dumps(watched.net))):
        twin(torch.ones(1, 3)).sum().backward()  # its own gradient, no verdict
        assert torch.equal(twin.weight, watched.net.weight)
