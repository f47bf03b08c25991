"""Checks of rows with known elements, which a mask selects."""

from collections.abc import Iterator
from functools import partial

import numpy as np

import samovar
from conformance.programs import ProgramChecks
from conformance.requests import Array, Request, evaluate
from conformance.results import Check, Outcome

_MASK = "known"


def checks(program_checks: ProgramChecks) -> Iterator[Check]:
    """Yield the checks of each operation and variant with a mask input."""
    model, num_rows = program_checks.model, program_checks.sample_inputs.num_rows
    for operation in model.operations.values():
        inputs = {input_.tensor.name for input_ in operation.inputs}
        if {_MASK, model.data_spec.tensor.name} <= inputs:
            for name, mask in _masks(model.data_spec.tensor).items():
                run = partial(_check_known, program_checks, operation, mask)
                yield Check(model.name, operation.name, f"known {name}", num_rows, run)


def _masks(spec: samovar.TensorSpec) -> dict[str, Array]:
    positions = np.arange(np.prod(spec.shape)).reshape(spec.shape)
    return {"raster prefix": positions < positions.size // 2, "every other element": positions % 2 == 0}


def _check_known(program_checks: ProgramChecks, operation: samovar.Operation, mask: Array) -> Outcome:
    """Check the answer to a request, and that the known elements in it are those of the request."""
    model, num_rows = program_checks.model, program_checks.sample_inputs.num_rows
    rows = program_checks.sample_inputs.rows_for(model, model.data_spec.tensor)
    known = np.repeat(mask[None], num_rows, 0).astype(np.uint8)
    inputs = {model.data_spec.tensor.name: rows, _MASK: known}
    request = Request(model, operation, num_rows, inputs, program_checks.base_parameters(operation))
    response = program_checks.send(request)
    is_unchanged = np.array_equal(response.result.value[:, mask], rows[:, mask])
    problems = [] if is_unchanged else ["known elements changed"]
    return evaluate(program_checks.client, request, response, *problems)
