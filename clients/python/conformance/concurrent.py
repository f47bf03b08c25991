"""What was asked one by one, asked again all at once: every row must have the bytes that it had alone.

So rows of different samplers, lengths and temperatures share the server's batches.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby

import samovar
from conformance.programs import Asked
from conformance.requests import Answer, Request, ask
from conformance.results import Exercise, Found

AT_ONCE = 32


def exercises(client: samovar.Client, asked: Asked) -> Iterator[Exercise]:
    """Each operation in all the ways that were asked, then everything."""
    for (model, operation), pairs in groupby(sorted(asked, key=_program), _program):
        if len(group := list(pairs)) > 1:
            yield _exercise(client, model, operation, group)
    yield _exercise(client, "all models", "all operations", asked)


def _program(pair: tuple[Request, Answer]) -> tuple[str, str]:
    return pair[0].model.name, pair[0].operation.name


def _exercise(client: samovar.Client, model: str, operation: str, asked: Asked) -> Exercise:
    rows = sum(request.rows for request, _ in asked)
    what = f"{len(asked)} requests at the same time"
    return Exercise(model, operation, what, rows, partial(_mixed, client, asked))


def _mixed(client: samovar.Client, asked: Asked) -> Found:
    with ThreadPoolExecutor(AT_ONCE) as threads:
        together = list(threads.map(lambda pair: ask(client, pair[0]), asked))
    wrong = tuple(_changed(asked, together))
    lengths = sorted({request.steps for request, _ in asked})
    told = "-".join(str(each) for each in (lengths[0], lengths[-1])) if len(lengths) > 1 else ""
    bitwise = sum(answer.is_bitwise for _, answer in asked)
    return Found((), f"{bitwise} with the bytes they have alone", wrong, steps=told)


def _changed(asked: Asked, together: Sequence[Answer]) -> Iterator[str]:
    for (request, alone), answer in zip(asked, together, strict=True):
        if alone.is_bitwise and answer.differs(alone):
            yield f"{request.model.name} {request.operation.name} {_told(request)}: other bytes in company"


def _told(request: Request) -> str:
    return ", ".join(f"{name}={value}" for name, value in request.parameters.items())
