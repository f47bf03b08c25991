"""Baselines for continuous batching: `python -m benchmarks.batching MODE [server options]`.

Request batching forms a batch when the device is idle, keeps its width until its longest row is done, and
answers all its requests then (request-level scheduling in the terms of Orca, OSDI 2022). Without batching
every request runs alone.
"""

import asyncio
import sys
from collections.abc import Sequence

from server import config, process
from server.app import App
from server.core.request import Request
from server.engine.scheduler import BatchingPolicy, ContinuousBatching
from server.execution.program_runner import ProgramRunner, Readout, StepResult


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
        self._withheld: list[Readout] = []

    @property
    def requests(self) -> list[Request]:
        return list(dict.fromkeys((*super().requests, *(readout.request for readout in self._withheld))))

    def batch_rows(self) -> int:
        return max(self._width, self.num_active)

    def advance(self) -> StepResult:
        self._width = self.batch_rows()
        result = super().advance()
        self._withheld += result.readouts
        if self.num_active:
            return StepResult([], result.rows, result.bucket, result.num_oom)
        readouts, self._withheld, self._width = self._withheld, [], 0
        return StepResult(readouts, result.rows, result.bucket, result.num_oom)

    def drop(self, request: Request) -> int:
        dropped = [readout for readout in self._withheld if readout.request is request]
        self._withheld = [readout for readout in self._withheld if readout.request is not request]
        steps = sum(sum(readout.steps_done) for readout in dropped if readout.is_finished)
        steps += super().drop(request)
        if not self.num_active and not self._withheld:
            self._width = 0
        return steps

    def empty(self) -> dict[Request, int]:
        steps = super().empty()
        for readout in self._withheld:
            if readout.is_finished:
                steps[readout.request] = steps.get(readout.request, 0) + sum(readout.steps_done)
        self._withheld, self._width = [], 0
        return steps


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
