"""The tasks: models, and batches as a function of the step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.corpus import is_held_out, load_stdlib, stdlib_files
from launch.data import DIGITS, DataError
from launch.models import ByteGPT, LeNet, RowLSTM
from launch.tasks import FASHION_MNIST, TASKS, BytesTask, ImageTask, Shard, Task

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits() -> ImageTask:
    return ImageTask(LeNet, DIGITS)


@pytest.fixture(scope="module")
def stdlib() -> BytesTask:
    return BytesTask(ByteGPT, context=16, num_valid_windows=100)


@pytest.fixture(params=["digits", "stdlib"])
def task(request: pytest.FixtureRequest) -> Task:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    ("model", "num_parameters"),
    [(LeNet(), 61_706), (LeNet(width=2), 244_362), (RowLSTM(), 214_282), (ByteGPT(), 484_416)],
)
def test_sizes_that_the_docstrings_name(model: torch.nn.Module, num_parameters: int) -> None:
    assert sum(p.numel() for p in model.parameters()) == num_parameters


@pytest.mark.parametrize("network", [LeNet, RowLSTM])
def test_image_models_give_ten_logits(network) -> None:
    assert network(width=2)(torch.zeros(3, 28, 28)).shape == (3, 10)


def test_gpt_does_not_see_the_future() -> None:
    torch.manual_seed(0)
    model = ByteGPT(context=16)
    tokens = torch.randint(256, (2, 16))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    before, after = model(tokens), model(changed)
    assert before.shape == (2, 16, 256)
    assert torch.equal(before[:, :9], after[:, :9])
    assert not torch.equal(before[:, 9:], after[:, 9:])


@pytest.mark.parametrize("step", [0, 3, 1000])
def test_ranks_share_the_same_global_batch(task: Task, step: int) -> None:
    whole = task.batch(step, Shard(0, 1, 24, seed=5))
    parts = [task.batch(step, Shard(rank, 4, 6, seed=5)) for rank in range(4)]
    for i in range(2):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])


def test_batches_are_a_function_of_seed_and_step(task: Task) -> None:
    shard = Shard(1, 2, 8, seed=1)
    first = task.batch(7, shard)
    task.batch(300, shard)
    again = task.batch(7, shard)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], task.batch(8, shard)[0])
    assert not torch.equal(first[0], task.batch(7, Shard(1, 2, 8, seed=2))[0])


def test_an_epoch_takes_each_image_once_and_the_next_in_another_order(digits: ImageTask) -> None:
    shards = [Shard(rank, 3, 20, seed=0) for rank in range(3)]
    num_steps = digits.steps_per_epoch(shards[0])
    assert num_steps == 1437 // 60

    def epoch(number: int) -> list[bytes]:
        steps = range(number * num_steps, (number + 1) * num_steps)
        return [x.numpy().tobytes() for step in steps for shard in shards for x in digits.batch(step, shard)[0]]

    first, second = epoch(0), epoch(1)
    known = {x.numpy().tobytes() for x in digits._scaled(digits._images.train_images)}
    assert len(set(first)) == len(first) == num_steps * 60
    assert set(first) <= known
    assert first != second


def test_test_is_shared_by_the_ranks(task: Task) -> None:
    torch.manual_seed(0)
    model = task.build_model()
    whole = task.evaluate(model, 0, 1, CPU)
    parts = sum(task.evaluate(model, rank, 3, CPU) for rank in range(3))
    assert torch.allclose(whole, torch.as_tensor(parts), rtol=1e-6)
    assert whole[1] == (360 if task.metric == "test_accuracy" else 100 * 16)


def test_untrained_model_knows_nothing(stdlib: BytesTask) -> None:
    torch.manual_seed(0)
    bits, num_bytes = stdlib.evaluate(stdlib.build_model(), 0, 1, CPU).tolist()
    assert 7.5 < bits / num_bytes < 8.7


def test_targets_are_the_next_bytes(stdlib: BytesTask) -> None:
    inputs, targets = stdlib.batch(0, Shard(0, 1, 4, seed=0))
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert inputs.dtype == torch.int64


def test_too_large_a_batch_gives_no_step(digits: ImageTask) -> None:
    assert digits.steps_per_epoch(Shard(0, 4, 1000, seed=0)) == 0


@pytest.mark.parametrize("name", [name for name, entry in TASKS.items() if entry.dataset is FASHION_MNIST])
def test_a_few_steps_lower_the_loss(name: str) -> None:
    task = TASKS[name].make(DIGITS, 1)
    torch.manual_seed(0)
    model = task.build_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(30):
        loss = task.loss(model, task.batch(step, Shard(0, 1, 64, seed=0)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(2.3, abs=0.1)
    assert losses[-1] < 1.7


def write_tree(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def test_stdlib_files_are_chosen_by_rule(tmp_path: Path) -> None:
    kept = ["abc.py", "json/decoder.py", "test_like.py", "z/y/x.py"]
    left_out = [
        "test/test_abc.py",
        "unittest/test/support.py",
        "lib2to3/tests/data/bom.py",
        "site-packages/numpy/core.py",
        "dist-packages/apt.py",
        "idlelib/run.py",
        "json/__pycache__/decoder.py",
        "abc.txt",
    ]
    write_tree(tmp_path, kept + left_out)
    assert stdlib_files(tmp_path) == kept


def test_the_rule_does_not_change() -> None:
    assert all(map(is_held_out, ["asyncio/events.py", "calendar.py", "copy.py"]))
    assert not any(map(is_held_out, ["abc.py", "json/decoder.py", "os.py"]))


def test_held_out_files_are_chosen_by_rule(tmp_path: Path) -> None:
    names = [f"m{i}.py" for i in range(40)]
    held_out = [name for name in names if is_held_out(name)]
    assert 1 <= len(held_out) <= 10
    write_tree(tmp_path, names)
    corpus = load_stdlib(tmp_path)
    assert bytes(corpus.valid.numpy()).decode().split("\0")[:-1] == sorted(held_out)
    assert set(bytes(corpus.train.numpy()).decode().split("\0")[:-1]) == set(names) - set(held_out)


def test_no_sources_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no Python source files"):
        load_stdlib(tmp_path)


def test_the_running_pythons_sources_are_enough() -> None:
    corpus = load_stdlib()
    assert len(corpus.train) > 5_000_000
    assert 0.03 < len(corpus.valid) / len(corpus.train) < 0.3
