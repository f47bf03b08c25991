"""Rows of which a part is given, by a mask: a beginning in raster order, and every other element."""

from collections.abc import Iterator
from functools import partial

import numpy as np

import samovar
from conformance.programs import Programs
from conformance.requests import Array, Request, judged
from conformance.results import Exercise, Found

KNOWN = "known"


def exercises(programs: Programs) -> Iterator[Exercise]:
    """What to do with each way to sample that takes a mask."""
    model, rows = programs.model, programs.pantry.rows
    for operation in model.operations.values():
        if {KNOWN, model.data_spec.tensor.name} <= {each.tensor.name for each in operation.inputs}:
            for what, mask in _masks(model.data_spec.tensor).items():
                do = partial(_kept, programs, operation, mask)
                yield Exercise(model.name, operation.name, f"given {what}", rows, do)


def _masks(spec: samovar.TensorSpec) -> dict[str, Array]:
    places = np.arange(np.prod(spec.shape)).reshape(spec.shape)
    return {"a raster prefix": places < places.size // 2, "every other element": places % 2 == 0}


def _kept(programs: Programs, operation: samovar.Operation, mask: Array) -> Found:
    model, rows = programs.model, programs.pantry.rows
    given = programs.pantry.give(model, model.data_spec.tensor)
    known = np.repeat(mask[None], rows, 0).astype(np.uint8)
    inputs = {model.data_spec.tensor.name: given, KNOWN: known}
    request = Request(model, operation, rows, inputs, programs.base(operation))
    answer = programs.ask(request)
    is_kept = np.array_equal(answer.result.value[:, mask], given[:, mask])
    return judged(programs.client, request, answer, *([] if is_kept else ["what is known did not stay"]))
