"""Checks of concurrent requests: all earlier requests at once must return bitwise equal rows.

Rows with other parameters and other numbers of steps then share the batches of the server.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby

import samovar
from conformance.requests import Exchange, Response, send
from conformance.results import Check, Outcome

_MAX_CONCURRENT_REQUESTS = 32


def checks(client: samovar.Client, exchanges: Sequence[Exchange]) -> Iterator[Check]:
    """Yield a check of each operation with several earlier requests, then one of all requests."""
    for (model, operation), group in groupby(sorted(exchanges, key=_program), _program):
        same_program = list(group)
        if len(same_program) > 1:
            yield _check(client, model, operation, same_program)
    yield _check(client, "all models", "all operations", exchanges)


def _program(exchange: Exchange) -> tuple[str, str]:
    request, _ = exchange
    return request.model.name, request.operation.name


def _check(client: samovar.Client, model: str, operation: str, exchanges: Sequence[Exchange]) -> Check:
    num_rows = sum(request.num_rows for request, _ in exchanges)
    name = f"{len(exchanges)} concurrent requests"
    return Check(model, operation, name, num_rows, partial(_repeat_concurrently, client, exchanges))


def _repeat_concurrently(client: samovar.Client, exchanges: Sequence[Exchange]) -> Outcome:
    with ThreadPoolExecutor(_MAX_CONCURRENT_REQUESTS) as threads:
        responses = list(threads.map(lambda exchange: send(client, exchange[0]), exchanges))
    steps = sorted({request.num_steps for request, _ in exchanges})
    return Outcome(
        shape=(),
        summary=f"{sum(response.is_bitwise for _, response in exchanges)} bitwise equal to single requests",
        problems=tuple(_differences(exchanges, responses)),
        steps=f"{steps[0]}-{steps[-1]}" if len(steps) > 1 else "",
    )


def _differences(exchanges: Sequence[Exchange], responses: Sequence[Response]) -> Iterator[str]:
    for (request, single), concurrent in zip(exchanges, responses, strict=True):
        if single.is_bitwise and concurrent.differs_from(single):
            parameters = ", ".join(f"{name}={value}" for name, value in request.parameters.items())
            program = f"{request.model.name} {request.operation.name}"
            yield f"{program} {parameters}: the rows differ from those of the single request"
