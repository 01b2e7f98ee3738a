"""The order of samples: which source, which of its samples, for which rank; and its counters."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.index import prepare_index
from data_pipeline.loader.mixture import Mixture
from data_pipeline.loader.order import Order, Part, Pick
from data_pipeline.loader.shuffle import SourceOrder, permutation
from data_pipeline.loader.state import OrderState, Source, SourceState, differences, go_on, start
from data_pipeline.shards import INDEX_FOLDER, ShardError, training_shards, write_shards

COUNTS = {"a": [30, 250, 1, 120], "b": [7], "c": [1000] * 3}


def make_state(**changes: int) -> OrderState:
    shares = {"a": 0.3, "b": 0.05, "c": 0.65}
    sources = {
        name: SourceState(share, sum(COUNTS[name]), name, changes.get(name, 0))
        for name, share in shares.items()
    }
    return OrderState(5, 200, sources, changes.get("samples", 0))


def make_order(state: OrderState) -> Order:
    return Order(
        [
            SourceOrder(name, np.array(COUNTS[name]), state.seed, state.shuffle_window)
            for name in state.sources
        ],
        state,
    )


def steps(order: Order, count: int, size: int = 1, micro_batch: int = 1) -> list[list[Pick]]:
    """The picks of `count` steps of 24 samples, those of all ranks together."""
    parts = [Part(24, micro_batch, rank, size) for rank in range(size)]
    ranks = [
        itertools.islice(itertools.chain.from_iterable(order.batches(part)), count * 24 // size)
        for part in parts
    ]
    return [
        [pick for rank in ranks for pick in itertools.islice(rank, 24 // size)]
        for _ in range(count)
    ]


def test_every_layout_has_the_same_steps() -> None:
    whole = steps(make_order(make_state()), 40)
    assert [pick.number for step in whole for pick in step] == list(range(960))
    for size, micro_batch in ((2, 1), (3, 2), (4, 3), (8, 1), (1, 12), (24, 1)):
        assert steps(make_order(make_state()), 40, size, micro_batch) == whole


@settings(max_examples=25)
@given(stops=st.lists(st.integers(0, 12), max_size=6), sizes=st.lists(st.sampled_from([1, 2, 3])))
def test_any_stops_in_any_layouts_leave_no_trace(stops: list[int], sizes: list[int]) -> None:
    state, found = make_state(), []
    for stop, size in zip(stops, itertools.chain(sizes, itertools.repeat(4)), strict=False):
        found += steps(make_order(state), stop, size)
        saved = json.loads(json.dumps(make_order(state).after(stop * 24).to_dict()))
        state = OrderState.from_dict(saved)
    assert found == steps(make_order(make_state()), sum(stops))


@settings(max_examples=25)
@given(asked=st.lists(st.integers(0, 10_000), min_size=1, max_size=6))
def test_the_counters_do_not_depend_on_when_they_were_asked_for(asked: list[int]) -> None:
    state = make_state(a=40, b=3, c=97, samples=140)
    order = make_order(state)
    for samples in asked:
        assert order.after(samples) == make_order(state).after(samples)
        assert order.after(samples).samples == 140 + samples


def test_a_save_counts_the_samples_since_the_one_before() -> None:
    """Of all samples of a run it took 16 bytes each, and seconds for every 10 millions."""
    order = make_order(make_state())
    order.after(2_000_000)
    tracemalloc.start()
    try:
        order.after(2_000_256)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 100_000


@settings(max_examples=25)
@given(
    counts=st.lists(st.integers(1, 260), min_size=1, max_size=4),
    window=st.integers(0, 700),
    epoch=st.integers(0, 3),
)
def test_an_epoch_has_each_sample_once(counts: list[int], window: int, epoch: int) -> None:
    order = SourceOrder("a", np.array(counts), 5, window)
    samples = sum(counts)
    epochs = [
        [order.sample(position) for position in range(start, start + samples)]
        for start in (epoch * samples, (epoch + 1) * samples)
    ]
    assert [sorted(found) for found in epochs] == [list(range(samples))] * 2
    if window == 0:
        assert epochs[0] == list(range(samples))
    elif samples > 20 and window > 20:
        assert epochs[0] != epochs[1]


def test_reads_stay_within_the_pieces_of_a_window() -> None:
    """Of 100,000 samples in shards of 1,000, those of a window come from few pieces of 100."""
    order = SourceOrder("a", np.full(100, 1000), 5, 2000)
    found = np.array([order.sample(position) for position in range(10_000)]).reshape(5, 2000)
    pieces = [set((window // 100).tolist()) for window in found]
    assert [len(of_window) for of_window in pieces] == [20] * 5
    assert len(set().union(*pieces)) == 100
    shards = {piece // 10 for piece in pieces[0]}
    assert len(shards) > 10
    # Mixed: a batch of 50 samples has some from most pieces of its window.
    batches = [len(set((found[0, i : i + 50] // 100).tolist())) for i in range(0, 2000, 50)]
    assert min(batches) > 13


def test_orders_differ_by_seed_and_source() -> None:
    def first(name: str, seed: int) -> list[int]:
        order = SourceOrder(name, np.array([500]), seed, 500)
        return [order.sample(position) for position in range(500)]

    orders = [first("a", 1), first("a", 2), first("b", 1)]
    for one, other in itertools.combinations(orders, 2):
        assert sum(x == y for x, y in zip(one, other, strict=True)) < 10


def test_a_permutation_is_random() -> None:
    """Each of the 24 orders of four, as often as the others: chi-squared, 23 degrees of freedom."""
    found = Counter(tuple(permutation(4, key * 7919).tolist()) for key in range(24_000))
    assert len(found) == 24
    assert sum((count - 1000) ** 2 / 1000 for count in found.values()) < 49.7  # p = 0.001


def test_the_order_is_the_same_on_every_machine() -> None:
    """A checkpoint goes on anywhere: these numbers may never change."""
    order = SourceOrder("toy-text", np.array([300, 200]), 1234, 400)
    assert [order.sample(position) for position in (0, 1, 2, 499, 500, 777)] == [
        395,
        69,
        89,
        240,
        12,
        452,
    ]
    assert Mixture([14, 44, 42], 1234).sources(0, 20).tolist() == [
        1,
        0,
        2,
        1,
        2,
        1,
        1,
        2,
        1,
        2,
        2,
        1,
        2,
        1,
        0,
        2,
        1,
        2,
        1,
        1,
    ]


def test_ten_thousand_draws_keep_the_mixture_to_a_thousandth() -> None:
    weights = np.array([79.0, 21.0, 300.0, 0.4])
    for seed in range(5):
        found = Mixture(weights.tolist(), seed).counts(seed * 1_000_003, 10_000)
        np.testing.assert_allclose(found / 10_000, weights / weights.sum(), rtol=0, atol=1e-3)


def test_every_rank_has_its_share_of_every_source() -> None:
    """Samples that a rank takes are in a row, where the shares are even."""
    mixture = Mixture([14, 44, 42], 3)
    for rank in range(8):
        found = mixture.counts(4096 + rank * 64, 64) / 64
        np.testing.assert_allclose(found, [0.14, 0.44, 0.42], rtol=0, atol=0.04)


def test_what_has_changed_is_named_and_begins_anew() -> None:
    saved = make_order(make_state()).after(240)
    taken = {name: source.taken for name, source in saved.sources.items()}
    assert sum(taken.values()) == saved.samples == 240
    assert list(differences(saved, make_state())) == []
    assert go_on(saved, make_state()) == saved

    sources = make_state().sources
    now = replace(
        make_state(),
        sources={
            "a": replace(sources["a"], share=0.5),
            "b": replace(sources["b"], samples=8, shards="more"),
            "new": SourceState(0.1, 5, "n"),
        },
    )
    assert list(differences(saved, now)) == [
        "source a has 50.00% of the samples (was 30.00%)",
        "source b has other shards (8 samples, was 7)",
        "source c is gone",
        "source new is new",
    ]
    after = go_on(saved, now)
    assert after.samples == 240
    assert {n: s.taken for n, s in after.sources.items()} == {"a": taken["a"], "b": 0, "new": 0}

    other = replace(make_state(), seed=6, shuffle_window=10)
    assert list(differences(saved, other)) == ["seed 6 (was 5)", "shuffle_window 10 (was 200)"]
    assert all(source.taken == 0 for source in go_on(saved, other).sources.values())


@pytest.mark.parametrize("wrong", [{}, {"sources": 3}, {"sources": {"a": {"x": 1}}}, {"seed": 1}])
def test_a_state_of_something_else_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        OrderState.from_dict(wrong)


def test_the_order_knows_shards_by_names_and_counts(tmp_path: Path) -> None:
    """A folder may move; shards that are renamed, or have another number of samples, are others."""
    states = []
    for name, count, prefix in (("x", 9, "s"), ("moved", 9, "s"), ("y", 8, "s"), ("z", 9, "t")):
        samples = ({"__key__": f"k{i}", "json": {"i": i}} for i in range(count))
        write_shards(samples, tmp_path / name, samples_per_shard=3, prefix=prefix)
        prepare_index(tmp_path / name)
        source = Source("one", str(tmp_path / name), "text", 2)
        states.append(start([source], {"one": training_shards(source.path)}, 1, 2).sources["one"])
    assert states[0] == states[1] == SourceState(1.0, 9, states[0].shards)
    assert len({state.shards for state in states}) == 3


def test_shards_that_energon_left_to_other_parts_are_not_read(tmp_path: Path) -> None:
    samples = ({"__key__": f"k{i}", "json": {"i": i}} for i in range(10))
    write_shards(samples, tmp_path, samples_per_shard=2)
    prepare_index(tmp_path)
    split = tmp_path / INDEX_FOLDER / "split.yaml"
    form = "split_parts:\n  train: ['shard-{{000000..000003}}.tar']\n  val: [{}]\nexclude: [{}]\n"
    split.write_text(form.format("shard-000004.tar", "shard-000002.tar"))
    assert training_shards(tmp_path) == {f"shard-00000{i}.tar": 2 for i in (0, 1, 3)}
    split.write_text(form.format("", "shard-000002.tar/k4"))
    with pytest.raises(ShardError, match="only whole shards can be left out"):
        training_shards(tmp_path)
    split.write_text("[")
    with pytest.raises(ShardError, match=r"split\.yaml cannot be read"):
        training_shards(tmp_path)
    split.write_text("split_parts: {train: []}")
    with pytest.raises(ShardError, match="no sample is left for training"):
        training_shards(tmp_path)
