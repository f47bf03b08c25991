"""Every operation and method: plainly, with its optional inputs, with each setting off its default.

Which settings and inputs there are is read from the description. A number must be heeded: with it, the
answer has to differ from the one without it, in at least one of the ways to ask that came before, as some
settings matter beside others only.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product

import samovar
from conformance.requests import Answer, Request, Scalar, ask, judged
from conformance.results import Exercise, Found
from conformance.sample_inputs import SampleInputs
from samovar import text
from samovar.model import ParameterType

Asked = list[tuple[Request, Answer]]


@dataclass
class Programs:
    """The programs of one model; `asked` fills with what was asked and answered, one thing at a time.

    most_steps: of rows that may say how many they take.
    """

    client: samovar.Client
    model: samovar.Model
    pantry: SampleInputs
    most_steps: int | None = None
    asked: Asked = field(default_factory=list)

    def exercises(self) -> Iterator[Exercise]:
        """What to do, in order."""
        for operation in self.model.operations.values():
            ways: Asked = []
            for inputs, (what, settings) in product(_selections(operation), _choices(operation)):
                words = [each.tensor.name for each in inputs if each.optional]
                told = ", ".join(filter(None, (what, f"with {'+'.join(words)}" if words else "")))
                request = self._request(operation, inputs, settings)
                yield self._exercise(operation, told, partial(self._answered, request, ways))
            for parameter in operation.parameters:
                if not parameter.choices:
                    value = self._off(parameter, operation)
                    heeded = partial(self._heeded, parameter.name, value, ways)
                    yield self._exercise(operation, f"{parameter.name}={_brief(value)}", heeded)

    def ask(self, request: Request) -> Answer:
        """The answer, which is remembered."""
        answer = ask(self.client, request)
        self.asked.append((request, answer))
        return answer

    def base(self, operation: samovar.Operation) -> dict[str, Scalar]:
        """Settings of every request: no more steps than are wanted."""
        usual = {each.name: each.default for each in operation.parameters}
        steps = operation.steps
        if self.most_steps is None or not steps.parameter or steps.of(usual) <= self.most_steps:
            return {}
        return {steps.parameter: self.most_steps * steps.units_per_step}

    def _request(
        self,
        operation: samovar.Operation,
        inputs: Sequence[samovar.Input],
        settings: dict[str, Scalar],
    ) -> Request:
        given = {each.tensor.name: self.pantry.give(self.model, each.tensor) for each in inputs}
        return Request(self.model, operation, self.pantry.rows, given, self.base(operation) | settings)

    def _answered(self, request: Request, ways: Asked) -> Found:
        answer = self.ask(request)
        ways.append((request, answer))
        return judged(self.client, request, answer)

    def _heeded(self, name: str, value: Scalar, ways: Asked) -> Found:
        """The answer in the first way to ask in which the setting makes a difference, and which that was.

        Fewer steps may lead to the same rows; that they were taken is seen in any answer. What a text
        is to stop at may never come; writing.py has a stop that does.
        """
        for way, without in ways:
            request = replace(way, parameters={**way.parameters, name: value})
            answer = ask(self.client, request)
            if answer.differs(without):
                self.asked.append((request, answer))
                found = judged(self.client, request, answer)
                beside = _beside(way.parameters, self.base(way.operation))
                return replace(found, rightly=f"{found.rightly}{beside}")
        if name in (request.operation.steps.parameter, text.STOP):
            return judged(self.client, request, answer)
        return Found((), "", (f"{name} makes no difference in {len(ways)} ways to ask",))

    def _off(self, parameter: samovar.Parameter, operation: samovar.Operation) -> Scalar:
        return off_default(parameter, self.base(operation).get(parameter.name, parameter.default))

    def _exercise(self, operation: samovar.Operation, what: str, do: partial[Found]) -> Exercise:
        return Exercise(self.model.name, operation.name, what, self.pantry.rows, do)


def off_default(parameter: samovar.Parameter, usual: Scalar) -> Scalar:
    """Another value than the usual one: halfway to the minimum, or away from it."""
    if parameter.type is ParameterType.BOOLEAN:
        return not usual
    number, low, high = float(usual), parameter.minimum, parameter.maximum
    if parameter.type is ParameterType.INTEGER:
        return int(low + number) // 2 if number > low else int(low) + 1
    return (low + number) / 2 if number > low else (low + high) / 2


def _selections(operation: samovar.Operation) -> list[tuple[samovar.Input, ...]]:
    """The inputs that are needed, with none, each and all of the others."""
    needed = tuple(each for each in operation.inputs if not each.optional)
    others = [each for each in operation.inputs if each.optional]
    every = [operation.inputs] if len(others) > 1 else []
    return [needed, *((*needed, each) for each in others), *every]


def _choices(operation: samovar.Operation) -> Iterator[tuple[str, dict[str, Scalar]]]:
    """No choice, then every other one than the default."""
    yield "", {}
    for parameter in operation.parameters:
        for choice in parameter.choices:
            if choice != parameter.default:
                yield f"{parameter.name}={choice}", {parameter.name: choice}


def _beside(settings: Mapping[str, Scalar], base: Mapping[str, Scalar]) -> str:
    """The settings that it takes for another one to matter."""
    told = [f"{name}={value}" for name, value in settings.items() if name not in base]
    return f", heeded beside {', '.join(told)}" if told else ""


def _brief(value: Scalar) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
