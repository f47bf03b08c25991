"""Checks at load: golden rows are replayed, and batch-invariant batch sizes are found."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import torch

from server.core.errors import InvalidArtifact
from server.core.spec import GoldenRows
from server.models.batch_invariance import BatchInvarianceCheck, is_batch_invariant
from server.models.golden_replay import GoldenReplay
from server.runtime import Device, Graph
from server.runtime.base import bind_by_copy
from tests.support import programs
from tests.support.programs import admit, new_runner, request

BUCKETS = (8, 16, 32)


def golden(rows: int = 3, error: float = 0.0, tolerance: float = 1e-6) -> GoldenRows:
    """Return golden rows of the walk, whose outputs differ by `error`."""
    runner = new_runner(buckets=(64,))
    admit(runner, request(rows=rows, steps=3, seed=4, first_row=9))
    outputs = [readout.rows.outputs["value"] for _ in range(3) for readout in runner.advance().wait()]
    return GoldenRows(
        "sample", 4, 9, rows, {}, {}, {"value": outputs[0] + np.float32(error)}, {"value": tolerance}
    )


def new_replay(graphs: Mapping[str, Graph] = programs.GRAPHS) -> GoldenReplay:
    return GoldenReplay(graphs, BUCKETS, Device())


@pytest.mark.parametrize("rows", [1, 3, 32, 50])
def test_golden_rows_with_recorded_outputs_pass(rows: int) -> None:
    new_replay().check(programs.WALK, golden(rows))


@pytest.mark.parametrize("rows", [3, 50])
def test_golden_rows_above_tolerance_are_rejected(rows: int) -> None:
    with pytest.raises(InvalidArtifact, match=r"output value differs by 0\.5, expected at most 0\.1"):
        new_replay().check(programs.WALK, golden(rows, error=0.5, tolerance=0.1))


def test_nan_is_above_any_tolerance() -> None:
    def all_nan(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return [inputs[0] * torch.nan]

    with pytest.raises(InvalidArtifact, match="differs by nan"):
        new_replay({**programs.GRAPHS, "end": all_nan}).check(programs.WALK, golden(tolerance=1e9))


def invariant_buckets(walk: Graph) -> dict[str, set[int]]:
    check = BatchInvarianceCheck({**programs.GRAPHS, "walk": walk}, BUCKETS)
    new_replay(check.recorded).check(programs.WALK, golden(tolerance=1.0))
    return check.invariant_buckets()


def test_graph_with_independent_rows_is_invariant_in_every_bucket() -> None:
    assert invariant_buckets(programs.walk) == {name: set(BUCKETS) for name in ("begin", "walk", "end")}


def differs_if_small(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The walk, with other low bits in batches of less than 16 rows."""
    (total,) = programs.walk(inputs)
    return [total * (1 + 1e-6) if len(total) < 16 else total]


def test_bucket_with_different_bits_is_found() -> None:
    found = invariant_buckets(differs_if_small)
    assert found["walk"] == {16, 32}
    assert found["end"] == set(BUCKETS)


def test_graph_that_depends_on_the_slot_has_no_invariant_bucket() -> None:
    def odd_slots_differ(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        (total,) = programs.walk(inputs)
        total[1::2] *= 1 + 1e-6
        return [total]

    assert invariant_buckets(odd_slots_differ)["walk"] == set()


def test_graph_that_depends_on_neighbors_has_no_invariant_bucket() -> None:
    def adds_neighbor(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        (total,) = programs.walk(inputs)
        return [total + 1e-3 * total.roll(1, 0)]

    assert invariant_buckets(adds_neighbor)["walk"] == set()


def test_every_bucket_is_warmed_up_even_if_none_is_invariant() -> None:
    sizes = set()

    def unstable(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        (total,) = programs.walk(inputs)
        sizes.add(len(total))
        total[1::2] *= 1 + 1e-6
        return [total]

    invariant_buckets(unstable)
    assert sizes == set(BUCKETS)


class Bindable:
    """The walk, with its own way of binding to tensors."""

    def __init__(self, step: Graph = programs.walk) -> None:
        self.num_bound = 0
        self._step = step

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return programs.walk(inputs)

    def bind(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> Callable[[], None]:
        self.num_bound += 1
        return bind_by_copy(self._step, inputs, outputs)


def test_replay_calls_steps_as_the_engine_does() -> None:
    graph = Bindable(lambda inputs: [programs.walk(inputs)[0] + 1])
    with pytest.raises(InvalidArtifact, match="output value differs by 3"):
        new_replay({**programs.GRAPHS, "walk": graph}).check(programs.WALK, golden())


def test_invariance_check_binds_every_step_before_serving() -> None:
    graph = Bindable()
    runner = new_runner(graphs={**programs.GRAPHS, "walk": graph}, buckets=BUCKETS)
    assert is_batch_invariant(runner, golden())
    assert graph.num_bound == 2 * len(BUCKETS)
    for rows in (1, 8, 9, 32):
        admit(runner, request(rows=rows, steps=3))
        while runner.num_active:
            runner.advance()
    assert graph.num_bound == 2 * len(BUCKETS)


def test_bound_step_with_different_bits_is_found() -> None:
    runner = new_runner(graphs={**programs.GRAPHS, "walk": Bindable(differs_if_small)}, buckets=BUCKETS)
    assert not is_batch_invariant(runner, golden())
