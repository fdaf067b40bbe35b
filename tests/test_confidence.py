"""Confidence functions against their equations, alone and through `cast_ballots`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from distsign import AdaptiveConfidence, Confidence, FixedConfidence, TargetDensity
from distsign.ballots import cast_ballots, keep_idle_stats

EVERY = [FixedConfidence(0.3), AdaptiveConfidence(), TargetDensity(0.1)]
every_function = pytest.mark.parametrize("confidence", EVERY, ids=lambda c: type(c).__name__)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Thousands of small tensors: threads that wait for each other would take three times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gradients(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(confidence: Confidence) -> Tensor:
    return confidence.init_stats(1)[0]


def run(confidence: Confidence, draw: Callable[[int], Tensor], num_steps: int) -> list[float]:
    """Return the density of each step's ballots."""
    stats = start(confidence)
    densities = []
    for step in range(num_steps):
        ballots, stats = cast_ballots(confidence, draw(step), stats)
        densities.append(float(ballots.abs().mean()))
    assert stats.isfinite().all()
    return densities


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda v: FixedConfidence(alpha=v), "alpha"),
        (lambda v: AdaptiveConfidence(beta1=v), "beta1"),
        (lambda v: AdaptiveConfidence(beta2=v), "beta2"),
        (lambda v: TargetDensity(density=v), "density"),
        (lambda v: TargetDensity(gain=v), "gain"),
    ],
)
@pytest.mark.parametrize("value", [-1e-9, -1.0, math.inf, -math.inf, math.nan, "0.1", None, True, False, 1j])
def test_options_out_of_range_are_named(make: Callable[[Any], Confidence], option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{option} must be in [\[(]0, .*\), got .*: "):
        make(value)


@pytest.mark.parametrize(
    ("make", "good", "bad"),
    [
        (lambda v: FixedConfidence(alpha=v), [0, 0.0, 5e-4, 1e30], []),
        (lambda v: AdaptiveConfidence(beta1=v), [0, 0.0, 0.999999], [1, 1.0, 2.0]),
        (lambda v: AdaptiveConfidence(beta2=v), [0, 0.0, 100.0], []),
        (lambda v: TargetDensity(density=v), [1e-9, 0.5, 1 - 1e-16], [0, 0.0, 1, 1.0]),
        (lambda v: TargetDensity(gain=v), [1e-9, 0.5, 0.999], [0, 0.0, 1, 1.0]),
    ],
)
def test_the_ends_of_the_ranges(make: Callable[[Any], Confidence], good: list[float], bad: list[float]) -> None:
    for value in good:
        assert make(value).init_stats(3).isfinite().all()
    for value in bad:
        with pytest.raises(ValueError, match="must be in"):
            make(value)


@every_function
def test_options_do_not_change_and_say_themselves(confidence: Confidence) -> None:
    """Ranks compare the `repr`, and an optimizer may share the object."""
    assert eval(repr(confidence)) == confidence  # noqa: S307
    with pytest.raises(AttributeError):
        confidence.alpha = 1.0  # type: ignore[attr-defined]


@every_function
def test_shapes_and_dtypes(confidence: Confidence) -> None:
    stats = confidence.init_stats(4)
    assert stats.shape == (4, confidence.num_stats) and stats.dtype == torch.float64
    alpha, stats = confidence.thresholds(stats, torch.ones(4, 2, dtype=torch.float64))
    assert alpha.shape == (4,) and alpha.dtype == torch.float64
    assert (alpha >= 0).all()
    stats = confidence.observe(stats, torch.full((4,), 0.5, dtype=torch.float64))
    assert stats.shape == (4, confidence.num_stats) and stats.dtype == torch.float64


@every_function
def test_nothing_is_changed_in_place(confidence: Confidence) -> None:
    stats = confidence.init_stats(3)
    moments = torch.rand(3, 2, dtype=torch.float64, generator=gradients(0))
    density = torch.rand(3, dtype=torch.float64, generator=gradients(1))
    before = [stats.clone(), moments.clone(), density.clone()]
    _, after = confidence.thresholds(stats, moments)
    kept = after.clone()
    confidence.observe(after, density)
    assert all(torch.equal(a, b) for a, b in zip([stats, moments, density], before, strict=True))
    assert torch.equal(after, kept)


@every_function
def test_rows_do_not_mix(confidence: Confidence) -> None:
    moments = torch.rand(5, 2, dtype=torch.float64, generator=gradients(2))
    density = torch.rand(5, dtype=torch.float64, generator=gradients(3))
    stats = confidence.init_stats(5) + torch.arange(5)[:, None] / 10
    alpha, together = confidence.thresholds(stats, moments)
    together = confidence.observe(together, density)
    for row in range(5):
        one = slice(row, row + 1)
        alone, new = confidence.thresholds(stats[one], moments[one])
        assert torch.equal(alone, alpha[one])
        assert torch.equal(confidence.observe(new, density[one]), together[one])


# ----------------------------------------------------------------------------------------------------- fixed, adaptive


def test_fixed_confidence_is_one_alpha_for_ever() -> None:
    grad = torch.tensor([0.5, -0.5, 0.50001, -0.6, 0.0, -0.0, 1e30])
    ballots, stats = cast_ballots(FixedConfidence(0.5), grad, torch.zeros(0))
    assert ballots.tolist() == [0, 0, 1, -1, 0, 0, 1]
    assert stats.shape == (0,)


@pytest.mark.parametrize("alpha", [0.0, -0.0])
def test_alpha_of_zero_lets_all_but_zeros_vote(alpha: float) -> None:
    ballots, _ = cast_ballots(FixedConfidence(alpha), torch.tensor([1e-45, -1e-45, 0.0, -0.0, 2.0]), torch.zeros(0))
    assert ballots.tolist() == [1, -1, 0, 0, 1]


@pytest.mark.parametrize(("beta1", "beta2"), [(0.9, 1.0), (0.0, 0.5), (0.99, 2.5)])
def test_adaptive_confidence_follows_the_papers_equation(beta1: float, beta2: float) -> None:
    """arXiv 1907.09008, Sec. 6.3, in Python's own floats, for 50 steps of a gradient whose scale wanders."""
    confidence = AdaptiveConfidence(beta1, beta2)
    generator = gradients(4)
    stats = start(confidence)
    s = 0.0
    for step in range(50):
        grad = torch.randn(7, 11, generator=generator) * math.exp(math.sin(step / 5)) + 0.3
        values = grad.flatten().tolist()
        mean = sum(values) / len(values)
        s = beta1 * s + (1 - beta1) * math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
        expected = [math.copysign(1.0, v) if abs(v) > beta2 * s else 0.0 for v in values]
        assert all(abs(abs(v) - beta2 * s) > 1e-6 for v in values), "no value sits on the threshold by chance"
        ballots, stats = cast_ballots(confidence, grad, stats)
        assert ballots.flatten().tolist() == expected, step
        assert float(stats[0]) == pytest.approx(s, rel=1e-12)


def test_adaptive_confidence_starts_dense() -> None:
    generator = gradients(5)
    densities = run(AdaptiveConfidence(), lambda _: torch.randn(10_000, generator=generator), 60)
    assert densities[0] == pytest.approx(math.erfc(0.1 / math.sqrt(2)), abs=0.02)  # alpha is a tenth of the deviation
    assert densities[-1] == pytest.approx(math.erfc(1 / math.sqrt(2)), abs=0.02)


# ------------------------------------------------------------------------------------------------------ target density


def laplace(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    return (-uniform.sign() * (1 - 2 * uniform.abs()).clamp(min=1e-300).log()).float()


def student(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Student's t with 3 degrees of freedom: heavy tails, its fourth moment is infinite."""
    normals = torch.randn((4, *shape), generator=generator)
    return normals[0] / (normals[1:] ** 2).mean(0).sqrt()


def heavier(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Student's t with 2 degrees of freedom: its variance is infinite, so that std(g) jumps from step to step."""
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    return ((2 * uniform - 1) / (2 * uniform * (1 - uniform)).sqrt()).float()


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


STREAMS = {"laplace": laplace, "gauss": normal, "student": student}


def constant_scale(step: int) -> float:
    del step
    return 1e-3


def moving_scale(step: int) -> float:
    """Falling by a factor of 200 in 100 steps, and swaying."""
    return 1e-2 * math.exp(-step / 19 + 0.3 * math.sin(step))


every_case = pytest.mark.parametrize(
    ("scale", "density"), [(constant_scale, 0.1), (moving_scale, 0.3), (moving_scale, 0.1), (moving_scale, 0.02)]
)


@every_case
@pytest.mark.parametrize("stream", STREAMS)
def test_target_density_reaches_its_target(stream: str, scale: Callable[[int], float], density: float) -> None:
    generator = gradients(6)
    draw = STREAMS[stream]
    densities = run(TargetDensity(density), lambda step: draw((20_000,), generator) * scale(step), 110)[60:]
    assert sum(densities) / 50 == pytest.approx(density, rel=0.05), "on average"
    within = sum(abs(d - density) <= 0.2 * density for d in densities)
    # One outlier moves a heavy-tailed stream's std(g), and with it alpha, in a step that no controller can foresee.
    assert within >= (45 if stream == "student" else 50)


@every_case
def test_target_density_holds_on_average_where_the_variance_is_infinite(
    scale: Callable[[int], float], density: float
) -> None:
    """A single step may then be far off, from next to nothing to several times the target."""
    generator = gradients(6)
    densities = run(TargetDensity(density), lambda step: heavier((10_000,), generator) * scale(step), 200)[60:]
    assert sum(densities) / 140 == pytest.approx(density, rel=0.2)
    assert max(densities) <= 5 * density


def test_target_density_is_right_at_once_for_a_laplace_gradient() -> None:
    generator = gradients(7)
    densities = run(TargetDensity(0.05), lambda _: laplace((50_000,), generator), 3)
    assert densities == pytest.approx([0.05] * 3, rel=0.1)


def test_target_density_follows_its_equation() -> None:
    confidence = TargetDensity(0.2, gain=0.25)
    stats = confidence.init_stats(6)
    log_c = math.log(-math.log(0.2) / math.sqrt(2.0))
    assert stats.tolist() == [[pytest.approx(log_c)]] * 6
    std = torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0, 0.0], dtype=torch.float64)
    alpha, same = confidence.thresholds(stats, torch.stack([torch.full_like(std, 9.0), std], 1))
    assert torch.equal(same, stats)
    torch.testing.assert_close(alpha, math.exp(log_c) * std)
    density = [0.2, 0.3, 0.1, 0.0, 1e-9, 1.0]
    found = confidence.observe(stats, torch.tensor(density, dtype=torch.float64))[:, 0].tolist()
    errors = [0.0, math.log(1.5), math.log(0.5), -2.0, -2.0, math.log(5.0)]
    assert found == pytest.approx([log_c + 0.25 * error for error in errors])


def test_target_density_recovers_from_silence_and_from_noise() -> None:
    """From a threshold far too high and one far too low, both ends of what the controller may correct in a step."""
    confidence = TargetDensity(0.1)
    for first in (8.0, -8.0):
        stats = torch.tensor([first], dtype=torch.float64)
        generator = gradients(8)
        for _ in range(100):
            ballots, stats = cast_ballots(confidence, normal((20_000,), generator), stats)
        assert float(ballots.abs().mean()) == pytest.approx(0.1, rel=0.2)


# --------------------------------------------------------------------------------------------------------- odd tensors


@pytest.mark.parametrize("confidence", [*EVERY, TargetDensity(1e-6, gain=0.99), AdaptiveConfidence(0.0, 50.0)])
def test_a_parameter_of_one_element_stays_in_bounds(confidence: Confidence) -> None:
    """It has no spread, so it votes or does not, and no alpha in units of its deviation can change that."""
    generator = gradients(9)
    stats = start(confidence)
    for _ in range(1000):
        grad = torch.randn(1, generator=generator)
        ballots, stats = cast_ballots(confidence, grad, stats)
        assert stats.isfinite().all() and (stats.abs() <= 20.0).all()
        if not isinstance(confidence, FixedConfidence):
            assert torch.equal(ballots, grad.sign())


@every_function
@pytest.mark.parametrize("shape", [(), (1,), (3, 0), (4, 5)])
def test_a_gradient_of_zeros_casts_no_ballot_and_leaves_the_stats(confidence: Confidence, shape: tuple[int]) -> None:
    stats = start(confidence)
    for _ in range(3):
        _, stats = cast_ballots(confidence, torch.randn(50, generator=gradients(10)), stats)
    for _ in range(3):
        ballots, after = cast_ballots(confidence, torch.zeros(shape), stats)
        assert torch.equal(after, stats)
        assert ballots.shape == shape and not ballots.any()


def test_idle_rows_keep_their_stats() -> None:
    old, new = torch.zeros(4, 2, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64)
    # Zero; a constant gradient, which has no spread; one that is symmetric about 0; one that holds a NaN.
    moments = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 2.0], [math.nan, math.nan]], dtype=torch.float64)
    assert keep_idle_stats(old, new, (moments != 0).any(1))[:, 0].tolist() == [0, 1, 1, 1]
    assert keep_idle_stats(old, new, None) is new


@every_function
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_ballots_have_the_gradients_shape_and_dtype(confidence: Confidence, dtype: torch.dtype) -> None:
    grad = torch.randn(6, 5, generator=gradients(11)).to(dtype).t().requires_grad_()
    before = grad.detach().clone()
    ballots, _ = cast_ballots(confidence, grad, start(confidence))
    assert ballots.shape == grad.shape and ballots.dtype == dtype and not ballots.requires_grad
    assert torch.equal(grad.detach(), before)
    assert torch.equal(ballots, torch.where(ballots != 0, before.sign(), 0.0))
    contiguous, _ = cast_ballots(confidence, before.contiguous(), start(confidence))
    if isinstance(confidence, FixedConfidence):
        assert torch.equal(contiguous, ballots)
