"""The proof before serving: golden rows, and the batch sizes in which rows keep their bits."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytest
import torch

from server.core.errors import InvalidArtifact
from server.core.spec import GoldenRows
from server.models.batch_invariance import Probe, is_batch_invariant
from server.runtime import Device, Graph
from server.runtime.base import bind_by_copy, bind_with_capture
from tests.support import programs
from tests.support.programs import admit, new_runner, request

BUCKETS = (8, 16, 32)


def golden(rows: int = 3, error: float = 0.0, tolerance: float = 1e-6) -> GoldenRows:
    """Rows of the walk with the answers that it gives, or such that are off by an error."""
    runner = new_runner(buckets=(64,))
    admit(runner, request(rows=rows, steps=3, seed=4, first_row=9))
    outputs = [readout.rows.outputs["value"] for _ in range(3) for readout in runner.advance().readouts]
    return GoldenRows(
        "sample", 4, 9, rows, {}, {}, {"value": outputs[0] + np.float32(error)}, {"value": tolerance}
    )


def probe(graphs: Mapping[str, Graph] = programs.GRAPHS) -> Probe:
    return Probe(graphs, BUCKETS, torch.device("cpu"))


@pytest.mark.parametrize("rows", [1, 3, 32, 50])
def test_rows_that_come_out_as_measured_pass(rows: int) -> None:
    probe().prove(programs.WALK, golden(rows))


@pytest.mark.parametrize("rows", [3, 50])
def test_rows_that_are_off_are_refused(rows: int) -> None:
    with pytest.raises(InvalidArtifact, match=r"value is off by 0\.5, allowed is 0\.1"):
        probe().prove(programs.WALK, golden(rows, error=0.5, tolerance=0.1))


def test_nan_is_never_within_tolerance() -> None:
    def lost(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return [inputs[0] * torch.nan]

    with pytest.raises(InvalidArtifact, match="off by nan"):
        probe({**programs.GRAPHS, "end": lost}).prove(programs.WALK, golden(tolerance=1e9))


def stable(walk: Graph) -> dict[str, set[int]]:
    made = probe({**programs.GRAPHS, "walk": walk})
    made.prove(programs.WALK, golden(tolerance=1.0))
    return made.stable_buckets()


def test_graphs_whose_rows_are_independent_keep_every_bucket() -> None:
    assert stable(programs.walk) == {name: set(BUCKETS) for name in ("begin", "walk", "end")}


def bent(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The walk, but for the last bits of small batches."""
    (total,) = programs.walk(inputs)
    return [total * (1 + 1e-6) if len(total) < 16 else total]


def test_a_bucket_in_which_rows_differ_is_found() -> None:
    found = stable(bent)
    assert found["walk"] == {16, 32}
    assert found["end"] == set(BUCKETS)


def test_rows_that_depend_on_their_slot_have_no_stable_bucket() -> None:
    def odd_slots_differ(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        (total,) = programs.walk(inputs)
        total[1::2] *= 1 + 1e-6
        return [total]

    assert stable(odd_slots_differ)["walk"] == set()


def test_rows_that_depend_on_their_neighbours_have_no_stable_bucket() -> None:
    def centred(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        (total,) = programs.walk(inputs)
        return [total + 1e-3 * total.roll(1, 0)]

    assert stable(centred)["walk"] == set()


def test_every_bucket_is_warm_even_where_none_is_stable() -> None:
    sizes = set()

    def unstable(inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        (total,) = programs.walk(inputs)
        sizes.add(len(total))
        total[1::2] *= 1 + 1e-6
        return [total]

    stable(unstable)
    assert sizes == set(BUCKETS)


class Bindable:
    """The walk, with another way to be called on the same tensors again and again."""

    def __init__(self, step: Graph = programs.walk) -> None:
        self.num_bound = 0
        self._step = step

    def __call__(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return programs.walk(inputs)

    def bind(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> Callable[[], None]:
        self.num_bound += 1
        return bind_by_copy(self._step, inputs, outputs)


def test_steps_are_proven_in_the_way_in_which_they_are_called_while_serving() -> None:
    graph = Bindable(lambda inputs: [programs.walk(inputs)[0] + 1])
    with pytest.raises(InvalidArtifact, match="value is off by 3"):
        probe({**programs.GRAPHS, "walk": graph}).prove(programs.WALK, golden())


def test_steps_are_bound_before_they_are_needed() -> None:
    graph = Bindable()
    runner = new_runner(graphs={**programs.GRAPHS, "walk": graph}, buckets=BUCKETS)
    assert is_batch_invariant(runner, golden())
    assert graph.num_bound == 2 * len(BUCKETS)
    for rows in (1, 8, 9, 32):
        admit(runner, request(rows=rows, steps=3))
        while runner.num_active:
            runner.advance()
    assert graph.num_bound == 2 * len(BUCKETS)


def test_steps_that_give_other_bits_when_bound_are_found() -> None:
    runner = new_runner(graphs={**programs.GRAPHS, "walk": Bindable(bent)}, buckets=BUCKETS)
    assert not is_batch_invariant(runner, golden())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it is captured")
def test_a_graph_that_cannot_be_captured_is_called_plainly(caplog: pytest.LogCaptureFixture) -> None:
    given, taken = torch.ones(4, 2), torch.zeros(4, 2)
    bind_with_capture(programs.identity, [given], [taken], Device("cuda", cuda_graphs=True))()
    assert torch.equal(taken, given)
    assert "cannot be captured" in caplog.text
