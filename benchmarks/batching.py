"""Baselines for continuous batching: `python -m benchmarks.batching MODE [server options]`.

Request batching forms a batch when the device is idle, keeps its width until its longest row is done, and
answers all its requests then (request-level scheduling in the terms of Orca, OSDI 2022). Without batching
every request runs alone.
"""

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from server import config, process
from server.app import App
from server.core.request import Request
from server.engine.scheduler import BatchingPolicy, ContinuousBatching
from server.execution.program_runner import ProgramRunner
from server.execution.readout import Finished, Readout, StepResult


class RequestBatching:
    """Requests join a batch only when none is running."""

    reserved_share = 0.0
    runs_to_completion = True

    def max_new_requests(self, num_running: int) -> int | None:
        return 0 if num_running else None


class NoBatching:
    """One request at a time."""

    reserved_share = 0.0
    runs_to_completion = True

    def max_new_requests(self, num_running: int) -> int | None:
        return 0 if num_running else 1


class WholeBatchRunner(ProgramRunner):
    """Runner whose batches keep their first width, and whose rows are read out when all of them are done."""

    def clear(self) -> None:
        super().clear()
        self._width = 0
        self._withheld: list[StepResult] = []

    @property
    def requests(self) -> list[Request]:
        withheld = (request for result in self._withheld for request in result.finished)
        return list(dict.fromkeys((*super().requests, *withheld)))

    def batch_rows(self) -> int:
        return max(self._width, self.num_active)

    def advance(self, max_steps: int = 1) -> StepResult:
        self._width = self.batch_rows()
        result = super().advance(max_steps)
        withheld = [*self._withheld, result]
        if self.num_active:
            self._withheld = withheld
            # The engine waits for each step, so that the device is never many steps behind.
            return replace(result, finished={}, wait=partial(_wait_for, [result], deliver=False))
        self._withheld, self._width = [], 0
        return replace(result, finished=_finished(withheld), wait=partial(_wait_for, withheld))

    def drop(self, request: Request) -> int:
        steps = super().drop(request)
        if not self.num_active and not any(result.finished for result in self._withheld):
            self._width = 0
        return steps

    def empty(self) -> dict[Request, int]:
        steps = super().empty()
        for request, finished in _finished(self._withheld).items():
            steps[request] = steps.get(request, 0) + finished.steps
        self._withheld, self._width = [], 0
        return steps


def _finished(results: Sequence[StepResult]) -> dict[Request, Finished]:
    """Return the finished rows of several steps, by request."""
    total: dict[Request, Finished] = {}
    for result in results:
        for request, finished in result.finished.items():
            before = total.get(request, Finished(0, 0))
            total[request] = Finished(before.rows + finished.rows, before.steps + finished.steps)
    return total


def _wait_for(results: Sequence[StepResult], deliver: bool = True) -> list[Readout]:
    """Wait for several steps; return their readouts, or none if they are to be delivered later."""
    readouts = [readout for result in results for readout in result.wait()]
    return readouts if deliver else []


MODES: dict[str, tuple[BatchingPolicy, type[ProgramRunner]]] = {
    "step": (ContinuousBatching(), ProgramRunner),
    "request": (RequestBatching(), WholeBatchRunner),
    "none": (NoBatching(), WholeBatchRunner),
}


async def _serve(settings: config.Config, mode: str) -> None:
    batching, runner = MODES[mode]
    await App(settings, batching=batching, runner=runner).run()


def main(arguments: Sequence[str]) -> None:
    """Serve like `python -m server`, with a batching mode."""
    mode, *options = arguments
    settings = config.parse(options)
    process.configure(settings.log_level)
    asyncio.run(_serve(settings, mode))


if __name__ == "__main__":
    main(sys.argv[1:])
