"""Figures of the paper: what they measure, on models of a few parameters and on a LeNet of a few steps."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launch.figures.__main__ import ALPHAS, main
from launch.figures.gradients import SparsityMeter, remaining_ratio
from launch.figures.landscape import filter_normalised, landscape
from launch.figures.training import alone, samples, trained
from launch.tasks import ImageTask

QUICK = ["--data=digits", "--steps=4", "--batch-size=16", "--lr=2e-3"]
VOTE = ["--optimizer=sign-adam-pp", "--hook=sign-vote"]


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    threads = torch.get_num_threads()
    with alone():
        yield
    torch.set_num_threads(threads)


class Plain(ImageTask):
    """The loss alone, without images."""

    def __init__(self) -> None:
        pass


def test_the_remaining_ratio_of_a_linear_model_is_as_by_hand() -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.zero_()[0] = torch.tensor([1.0, 0.0])
    x, y = torch.tensor([[2.0, 0.5], [2.0, 0.5]]), torch.tensor([0, 1])  # the model says 0 to both
    p = torch.tensor([2.0, 0.0]).softmax(0)
    found = remaining_ratio(model, Plain(), (x, y), [0.0, 0.1, 1.0])
    assert (found.num_correct, found.num_wrong) == (1, 1)
    for values, distance in ((found.correct, p[1]), (found.wrong, p[0])):
        g = torch.tensor([2.0, 0.5, 2.0, 0.5]) * distance
        by_hand = [(g[g > alpha].norm() / g.norm()).item() for alpha in (0.0, 0.1, 1.0)]
        assert values == pytest.approx(by_hand)
    assert found.correct[1] < found.wrong[1] == pytest.approx(1)


def test_the_remaining_ratio_begins_at_one_and_falls() -> None:
    with trained([*QUICK, "--optimizer=adam"]) as trainer:
        batch = samples(trainer, 40)
        found = remaining_ratio(trainer.net, trainer.task, batch, ALPHAS)
    assert found.num_correct + found.num_wrong == 40
    assert found.num_correct > 0 < found.num_wrong
    for values in (found.correct, found.wrong):
        assert values[0] == pytest.approx(1, abs=1e-6)
        assert all(a >= b for a, b in zip(values, values[1:], strict=False))
        assert 0 <= values[-1] < 0.99


def test_no_sample_of_a_kind_gives_no_ratio() -> None:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        y = model(torch.ones(1, 2)).argmax(dim=1)
    found = remaining_ratio(model, Plain(), (torch.ones(1, 2), y), [0.0])
    assert found.correct == [pytest.approx(1)] and math.isnan(found.wrong[0])


@pytest.mark.parametrize(("alpha", "sparsity"), [(0.0, (0, 0.9)), (1e-3, (0.2, 0.999)), (1e9, (1, 1))])
def test_sparsity_is_the_share_of_components_that_do_not_vote(alpha: float, sparsity: tuple[float, float]) -> None:
    meter = SparsityMeter()
    with trained(
        ["--data=digits", "--batch-size=512", "--epochs=2", *VOTE, f"--confidence=fixed:alpha={alpha}"], meter
    ) as trainer:
        density = trainer.combiner.traffic(trainer.progress.step).ballot_density
    assert density is not None
    rows = meter.rows()
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(sparsity[0] <= row["overall"] <= sparsity[1] for row in rows)
    assert sum(row["overall"] for row in rows) / 2 == pytest.approx(1 - density, abs=1e-6)
    assert {"conv1.weight", "fc3.bias"} < rows[0].keys()


def test_directions_are_as_long_as_each_filter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 4))
    direction = filter_normalised(model, seed=1)
    for p, d in zip(model.parameters(), direction, strict=True):
        if p.ndim < 2:
            assert not d.any()
        else:
            assert torch.allclose(d.flatten(1).norm(dim=1), p.detach().flatten(1).norm(dim=1))
    others = filter_normalised(model, seed=2)
    assert not torch.equal(direction[0], others[0])
    assert torch.equal(direction[0], filter_normalised(model, seed=1)[0])


class Bowl(nn.Module):
    """Its loss is the square of the distance to (3, -1), whatever the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[3.0, -1.0]]))


class BowlTask(Plain):
    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model.w, torch.tensor([[3.0, -1.0]]), reduction="sum")


def test_a_surface_is_as_by_hand() -> None:
    model = Bowl()
    directions = [torch.tensor([[1.0, 0.0]])], [torch.tensor([[0.0, 2.0]])]
    batch = torch.zeros(1), torch.zeros(1)
    found = landscape(model, BowlTask(), batch, directions, points=5, reach=2)
    assert found.along == [-2, -1, 0, 1, 2]
    expected = [[x * x + 4 * y * y for y in found.along] for x in found.along]
    assert torch.allclose(torch.tensor(found.surface), torch.tensor(expected, dtype=torch.float32))
    assert found.centre == 0 and found.slice == [4, 1, 0, 1, 4]
    assert len(found.rows()) == 25
    for points in (1, 4):
        with pytest.raises(ValueError, match=f"--points must be odd and at least 3.*got {points}"):
            landscape(model, BowlTask(), batch, directions, points)


def test_the_centre_is_the_trained_loss_and_the_model_stays() -> None:
    with trained([*QUICK, "--optimizer=adam"]) as trainer:
        batch = samples(trainer, 64)
        loss = trainer.task.loss(trainer.net, batch).item()
        before = [p.clone() for p in trainer.net.parameters()]
        directions = filter_normalised(trainer.net, 1), filter_normalised(trainer.net, 2)
        found = landscape(trainer.net, trainer.task, batch, directions, points=3)
        assert all(torch.equal(a, b) for a, b in zip(before, trainer.net.parameters(), strict=True))
    assert found.centre == loss
    assert len({value for row in found.surface for value in row}) == 9


def test_the_command_writes_numbers_and_pictures(tmp_path: Path) -> None:
    votes = f"--scheme=votes={' '.join(VOTE)} --confidence=fixed:alpha=0.01"
    for figure, more, name, num_rows in (
        ("remaining", ["--samples=20"], "remaining-ADAM", len(ALPHAS)),
        ("sparsity", [votes], "sparsity-votes", 1),
        ("landscape", ["--samples=20", "--points=3"], "landscape-signADAMpp", 9),
    ):
        assert main([figure, f"--out={tmp_path}", *more, *QUICK]) == 0
        with (tmp_path / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        written = json.loads((tmp_path / f"{name}.json").read_text())
        assert len(rows) == len(written["rows"]) == num_rows
        assert "digits" in written["data"] and "--steps=4" in written["options"]
        assert float(rows[-1][list(rows[-1])[-1]]) == pytest.approx(list(written["rows"][-1].values())[-1])
    pictures = sorted(tmp_path.glob("*.png"))
    assert [path.stem for path in pictures] == ["landscape", "remaining-ADAM", "sparsity-votes"]
    for path in pictures:
        assert is_drawn(path), path


def is_drawn(path: Path) -> bool:
    from matplotlib.image import imread

    return len({tuple(pixel) for row in imread(path) for pixel in row.tolist()}) > 20


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["remaining", "--samples=0"], "--samples must be 1 or more, got 0"),
        (["remaining", "--samples=100000", *QUICK], "--samples must be at most the training data's number, got 100000"),
        (["landscape", "--points=4", "--samples=4", *QUICK], "--points must be odd and at least 3"),
        (["landscape", "--scheme=adam"], "--scheme must be NAME=OPTIONS"),
        (["sparsity", "--optimizer=adagrd"], "invalid choice: 'adagrd'"),
        (["sparsity", "--data=/no/such"], "the data folder /no/such is no folder"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*argv[:1], f"--out={tmp_path}", *argv[1:]]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said
