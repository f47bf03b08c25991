"""Checks of each operation and variant: inputs, choices and numbers, by the model's description.

A number must have an effect: with another value, the answer must differ from the one with the default. Some
parameters have an effect only together with a choice or an optional input, so the check tries all requests of
the operation until one answer differs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

import samovar
from conformance.requests import Exchange, Request, Response, Scalar, evaluate, send
from conformance.results import Check, Outcome
from conformance.sample_inputs import SampleInputs
from samovar import text
from samovar.model import ParameterType


@dataclass
class ProgramChecks:
    """Checks of all programs of one model.

    Attributes:
        client: Connection to the server.
        model: The model.
        sample_inputs: Rows for the inputs.
        max_steps: Maximum number of steps where a parameter sets it; None for the defaults.
        exchanges: The requests of the checks so far, and their responses.
    """

    client: samovar.Client
    model: samovar.Model
    sample_inputs: SampleInputs
    max_steps: int | None = None
    exchanges: list[Exchange] = field(default_factory=list)

    def checks(self) -> Iterator[Check]:
        """Yield the checks in the order in which they must run."""
        for operation in self.model.operations.values():
            exchanges: list[Exchange] = []
            for inputs, (choice, parameters) in product(_input_sets(operation), _choices(operation)):
                optional = "+".join(input_.tensor.name for input_ in inputs if input_.optional)
                name = ", ".join(filter(None, (choice, f"with {optional}" if optional else ""))) or "defaults"
                request = self._request(operation, inputs, parameters)
                yield self._check(operation, name, partial(self._check_answer, request, exchanges))
            for parameter in operation.parameters:
                if not parameter.choices:
                    value = self._value_off_default(parameter, operation)
                    run = partial(self._check_effect, parameter.name, value, exchanges)
                    yield self._check(operation, f"{parameter.name}={_format(value)}", run)

    def send(self, request: Request) -> Response:
        """Send a request, record the exchange and return the response."""
        response = send(self.client, request)
        self.exchanges.append((request, response))
        return response

    def base_parameters(self, operation: samovar.Operation) -> dict[str, Scalar]:
        """Return the parameters of all requests of an operation, which limit the number of steps."""
        defaults = {parameter.name: parameter.default for parameter in operation.parameters}
        steps = operation.steps
        if self.max_steps is None or not steps.parameter or steps.num_steps(defaults) <= self.max_steps:
            return {}
        return {steps.parameter: self.max_steps * steps.units_per_step}

    def _request(
        self,
        operation: samovar.Operation,
        inputs: Sequence[samovar.Input],
        parameters: Mapping[str, Scalar],
    ) -> Request:
        arrays = {
            input_.tensor.name: self.sample_inputs.rows_for(self.model, input_.tensor) for input_ in inputs
        }
        parameters = {**self.base_parameters(operation), **parameters}
        return Request(self.model, operation, self.sample_inputs.num_rows, arrays, parameters)

    def _check_answer(self, request: Request, exchanges: list[Exchange]) -> Outcome:
        """Check the answer to a request, and add the exchange to `exchanges`."""
        response = self.send(request)
        exchanges.append((request, response))
        return evaluate(self.client, request, response)

    def _check_effect(self, name: str, value: Scalar, exchanges: Sequence[Exchange]) -> Outcome:
        """Check that a parameter changes the answer to one of the requests in `exchanges`.

        Two parameters need not change it: other numbers of steps can lead to equal rows, and `evaluate`
        compares the number of steps; a stop token may not occur, and tokens.py checks one that does.
        """
        for base_request, base_response in exchanges:
            request = replace(base_request, parameters={**base_request.parameters, name: value})
            response = send(self.client, request)
            if response.differs_from(base_response):
                self.exchanges.append((request, response))
                outcome = evaluate(self.client, request, response)
                needed = self._format_parameters(base_request)
                effect = f", has an effect with {needed}" if needed else ""
                return replace(outcome, summary=f"{outcome.summary}{effect}")
        if name in (request.operation.steps.parameter, text.STOP):
            return evaluate(self.client, request, response)
        return Outcome((), "", (f"{name} has no effect in {len(exchanges)} requests",))

    def _value_off_default(self, parameter: samovar.Parameter, operation: samovar.Operation) -> Scalar:
        default = self.base_parameters(operation).get(parameter.name, parameter.default)
        return _other_value(parameter, default)

    def _format_parameters(self, request: Request) -> str:
        base = self.base_parameters(request.operation)
        return ", ".join(f"{name}={value}" for name, value in request.parameters.items() if name not in base)

    def _check(self, operation: samovar.Operation, name: str, run: partial[Outcome]) -> Check:
        return Check(self.model.name, operation.name, name, self.sample_inputs.num_rows, run)


def _other_value(parameter: samovar.Parameter, default: Scalar) -> Scalar:
    """Return a value other than the default: halfway to the minimum, or above it if that is the default."""
    if parameter.type is ParameterType.BOOLEAN:
        return not default
    number, low, high = float(default), parameter.minimum, parameter.maximum
    if parameter.type is ParameterType.INTEGER:
        return int(low + number) // 2 if number > low else int(low) + 1
    return (low + number) / 2 if number > low else (low + high) / 2


def _input_sets(operation: samovar.Operation) -> list[tuple[samovar.Input, ...]]:
    """Return the required inputs alone, with each of the optional ones, and with all of them."""
    required = tuple(input_ for input_ in operation.inputs if not input_.optional)
    optional = [input_ for input_ in operation.inputs if input_.optional]
    all_inputs = [operation.inputs] if len(optional) > 1 else []
    return [required, *((*required, input_) for input_ in optional), *all_inputs]


def _choices(operation: samovar.Operation) -> Iterator[tuple[str, dict[str, Scalar]]]:
    """Yield no parameter, then each choice that is not a default, with its text."""
    yield "", {}
    for parameter in operation.parameters:
        for choice in parameter.choices:
            if choice != parameter.default:
                yield f"{parameter.name}={choice}", {parameter.name: choice}


def _format(value: Scalar) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
