"""Who owns what, and where it lies: from the shapes alone, whatever the buckets are."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distsign.layout import Layout, Shape, shards
from distsign.traffic import exchange_bytes

NUM_ELEMENTS = st.one_of(
    st.sampled_from([0, 1, 31, 32, 33, 511, 512, 513, 1023, 1024, 1025, 4095, 4096, 4097]),
    st.integers(0, 300),
    st.integers(0, 100_000),
)
WORLD_SIZES = st.one_of(st.integers(1, 9), st.sampled_from([16, 17, 33, 64]))
# A model of a usual mix: a few large matrices, odd convolutions, many small biases and norms.
MODEL = [
    Shape(i, n)
    for i, n in enumerate([1024 * 768, 768, 768 * 768 + 7, 10, 3 * 3 * 64 * 128, 128, 128, 1, 50_257 * 96, 1000] * 3)
]


@st.composite
def models(draw: st.DrawFn) -> list[Shape]:
    sizes = draw(st.lists(NUM_ELEMENTS, min_size=1, max_size=8))
    first = draw(st.integers(0, 5))
    return [Shape(first + i, n) for i, n in enumerate(sizes)]


def cut(draw: st.DrawFn, shapes: list[Shape]) -> list[list[Shape]]:
    """Deal the parameters into buckets, in any order."""
    order = draw(st.permutations(shapes))
    cuts = draw(st.lists(st.booleans(), min_size=len(order) - 1, max_size=len(order) - 1))
    buckets = [[order[0]]]
    for shape, new in zip(order[1:], cuts, strict=True):
        if new:
            buckets.append([])
        buckets[-1].append(shape)
    return buckets


groups = st.composite(lambda draw: cut(draw, draw(models())))()


def ownership(layout: Layout, buckets: list[list[Shape]]) -> dict[int, list[tuple[int, int, int]]]:
    """Read `(start, stop, owner)` of each parameter's pieces off the places in the buffer."""
    found: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    row = 0
    for bucket, pieces in zip(buckets, layout.pieces, strict=True):
        bounds = 0
        first_row = row
        for shape in bucket:
            for k in range(pieces.start.size):
                if pieces.row[k] == row:
                    start = int(pieces.start[k]) - bounds
                    at = int(pieces.mask_at[k])
                    owner = max(w for w, offset in enumerate(layout.offsets) if offset < at)
                    found[shape.index].append((start, start + int(pieces.length[k]), owner))
            bounds += shape.num_elements
            row += 1
        assert set(pieces.row.tolist()) <= set(range(first_row, row)), "a bucket's pieces belong to its own parameters"
    return found


# -------------------------------------------------------------------------------------------------------------- shards


@given(st.integers(0, 100), NUM_ELEMENTS, WORLD_SIZES)
def test_shards_cover_a_parameter_once_and_in_order(index: int, num_elements: int, world_size: int) -> None:
    pieces = shards(Shape(index, num_elements), world_size)
    end = 0
    for owner, start, stop in pieces:
        assert 0 <= owner < world_size
        assert start == end and start % 32 == 0
        assert stop > start or num_elements == 0
        end = stop
    assert end == num_elements


@given(st.integers(0, 100), NUM_ELEMENTS, WORLD_SIZES)
def test_small_parameters_are_owned_whole_and_large_ones_by_all(index: int, num_elements: int, world_size: int) -> None:
    owners = [owner for owner, _, _ in shards(Shape(index, num_elements), world_size)]
    if num_elements < 1024 or num_elements < 32 * world_size:
        assert owners == [index % world_size]
    else:
        assert owners == list(range(world_size))


@pytest.mark.parametrize(("world_size", "least"), [(2, 1024), (32, 1024), (33, 1056), (64, 2048)])
def test_the_smallest_parameter_that_is_cut(world_size: int, least: int) -> None:
    assert len(shards(Shape(3, least - 1), world_size)) == 1
    assert len(shards(Shape(3, least), world_size)) == world_size


@settings(max_examples=300)
@given(st.integers(1024, 200_000), WORLD_SIZES)
def test_pieces_differ_by_fewer_than_64_elements(num_elements: int, world_size: int) -> None:
    """As `shards` documents it."""
    sizes = [stop - start for _, start, stop in shards(Shape(0, num_elements), world_size)]
    assert max(sizes) - min(sizes) < 64


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 8])
def test_small_parameters_are_dealt_out_in_turn(world_size: int) -> None:
    owners = [shards(Shape(index, 100), world_size)[0][0] for index in range(3 * world_size)]
    assert owners == list(range(world_size)) * 3


# -------------------------------------------------------------------------------------------------------------- layout


@given(groups, WORLD_SIZES)
def test_pieces_cover_each_bucket_once(buckets: list[list[Shape]], world_size: int) -> None:
    layout = Layout.build(buckets, world_size)
    for bucket, pieces, params in zip(buckets, layout.pieces, layout.params, strict=True):
        spans = sorted(zip(pieces.start.tolist(), pieces.length.tolist(), strict=True))
        end = 0
        for start, length in spans:
            assert start == end
            end += length
        assert end == sum(shape.num_elements for shape in bucket)
        assert params.length.tolist() == [shape.num_elements for shape in bucket]
        assert params.start.tolist() == [sum(s.num_elements for s in bucket[:k]) for k in range(len(bucket))]
        assert params.row.tolist() == list(range(len(bucket)))
    assert list(layout.shapes) == [shape for bucket in buckets for shape in bucket]
    assert layout.num_elements == sum(layout.owned_elements) == sum(s.num_elements for s in layout.shapes)


@given(groups, WORLD_SIZES)
def test_places_fill_the_buffer_and_do_not_overlap(buckets: list[list[Shape]], world_size: int) -> None:
    layout = Layout.build(buckets, world_size)
    taken = [(offset, offset + 8) for offset in layout.offsets]
    for pieces in layout.pieces:
        for length, mask_at, sign_at in zip(
            pieces.length.tolist(), pieces.mask_at.tolist(), pieces.sign_at.tolist(), strict=True
        ):
            num_bytes = -(-length // 8)
            taken += [(mask_at, mask_at + num_bytes), (sign_at, sign_at + num_bytes)]
    end = 0
    for start, stop in sorted(taken):
        assert start == end, "neither a gap nor an overlap"
        end = stop
    assert end == layout.buffer_bytes


@given(groups, WORLD_SIZES)
def test_a_payload_is_header_and_two_planes_of_what_its_owner_counts(
    buckets: list[list[Shape]], world_size: int
) -> None:
    layout = Layout.build(buckets, world_size)
    plane = [0] * world_size
    elements = [0] * world_size
    for bucket in buckets:
        for shape in bucket:
            for owner, start, stop in shards(shape, world_size):
                plane[owner] += -(-(stop - start) // 8)
                elements[owner] += stop - start
    assert list(layout.sizes) == [8 + 2 * num_bytes for num_bytes in plane]
    assert [layout.plane_bytes(owner) for owner in range(world_size)] == plane
    assert list(layout.owned_elements) == elements
    assert list(layout.offsets) == [sum(layout.sizes[:k]) for k in range(world_size)]
    assert layout.buffer_bytes == sum(layout.sizes)


@given(groups, WORLD_SIZES)
def test_sign_planes_follow_the_mask_planes_in_the_same_order(buckets: list[list[Shape]], world_size: int) -> None:
    """The tally reads all of an owner's masks as one plane, and the signs behind them as another."""
    layout = Layout.build(buckets, world_size)
    for pieces in layout.pieces:
        for length, mask_at, sign_at in zip(
            pieces.length.tolist(), pieces.mask_at.tolist(), pieces.sign_at.tolist(), strict=True
        ):
            if length:
                owner = max(w for w, offset in enumerate(layout.offsets) if offset <= mask_at)
                body = layout.offsets[owner] + 8
                assert body <= mask_at < body + layout.plane_bytes(owner)
                assert sign_at == mask_at + layout.plane_bytes(owner)


@settings(max_examples=150)
@given(st.data(), models(), WORLD_SIZES)
def test_an_owner_does_not_depend_on_the_buckets(data: st.DataObject, model: list[Shape], world_size: int) -> None:
    """DDP rebuilds its buckets after the first step, reversed, and an owner's memory must survive that."""
    model = [shape for shape in model if shape.num_elements]
    if not model:
        return
    whole = [model]
    wanted = ownership(Layout.build(whole, world_size), whole)
    assert wanted == {s.index: [(a, b, owner) for owner, a, b in shards(s, world_size)] for s in model}
    # All buckets in one exchange group, and each in a group of its own.
    buckets = cut(data.draw, model)
    assert ownership(Layout.build(buckets, world_size), buckets) == wanted
    apart: dict[int, list[tuple[int, int, int]]] = {}
    for bucket in buckets:
        apart |= ownership(Layout.build([bucket], world_size), [bucket])
    assert apart == wanted


def test_rows_count_through_the_group() -> None:
    layout = Layout.build([[Shape(7, 2048), Shape(3, 5)], [Shape(1, 100)]], world_size=2)
    assert [pieces.row.tolist() for pieces in layout.pieces] == [[0, 0, 1], [2]]
    assert [params.row.tolist() for params in layout.params] == [[0, 1], [0]]
    # Owner 0: elements 0 to 1023 of parameter 7. Owner 1: the rest of it, parameter 3 (index 3 % 2), parameter 1.
    assert layout.owned_elements == (1024, 1024 + 5 + 100)
    assert layout.sizes == (8 + 2 * 128, 8 + 2 * (128 + 1 + 13))
    assert [pieces.mask_at.tolist() for pieces in layout.pieces] == [[8, 264 + 8, 264 + 8 + 128], [264 + 8 + 129]]
    assert [pieces.sign_at.tolist() for pieces in layout.pieces] == [
        [8 + 128, 264 + 8 + 142, 264 + 8 + 142 + 128],
        [264 + 8 + 142 + 129],
    ]


@pytest.mark.parametrize("world_size", [1, 3])
def test_layouts_of_nothing(world_size: int) -> None:
    for buckets in ([], [[]], [[], []], [[Shape(0, 0)]]):
        layout = Layout.build(buckets, world_size)
        assert layout.sizes == (8,) * world_size
        assert layout.num_elements == 0


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 8, 16, 33, 64])
def test_bytes_per_rank_stay_flat_as_workers_are_added(world_size: int) -> None:
    """Two phases of two bits: `n / 2 * (W - 1) / W` bytes sent, and as many received."""
    num_elements = sum(shape.num_elements for shape in MODEL)
    sizes = Layout.build([MODEL], world_size).sizes
    ideal = num_elements / 2 * (world_size - 1) / world_size
    for rank in range(world_size):
        sent = exchange_bytes(sizes, rank).sent_bytes
        assert 0.98 * ideal <= sent <= 1.02 * ideal, f"rank {rank}: {sent / ideal:.4f} of the ideal"


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 8, 16])
def test_a_model_of_small_parameters_is_spread_over_the_ranks(world_size: int) -> None:
    layout = Layout.build([[Shape(i, 500 + i % 7) for i in range(320)]], world_size)
    assert max(layout.owned_elements) <= 1.1 * sum(layout.owned_elements) / world_size
