"""Check every operation of every model of a server over gRPC, and print one line per check.

Run it in clients/python:

python -m conformance                               # all models of the local server
python -m conformance --rows 8 digits-vae           # one model, with more rows per request
python -m conformance --steps 20                    # faster: at most 20 steps where a parameter sets them

The models' descriptions determine the checks:

- each operation and variant: with default parameters, with optional inputs, with each choice of a parameter,
  and with each number off its default, which must have an effect (conformance/programs.py);
- rows with known elements, which must not change (conformance/masks.py);
- interpolation and edits in the latent space of models that decode (conformance/latents.py);
- prompts, streams, stop tokens and MIDI files of models of tokens (conformance/tokens.py);
- the same requests concurrently, with bitwise equal rows (conformance/concurrent.py);
- unsupported operations: the server must reject them with FAILED_PRECONDITION and a reason
  (conformance/rejections.py).

Inputs are samples of the models; if no model samples such rows, they are random numbers within the declared
bounds. An answer is correct if it has the declared shape, data type, bounds and number of steps, and no NaN.
A request for its last row alone must return the same row, bitwise if the server reports "bitwise". The exit
code is 1 if a check fails or the server has no such model, otherwise 0.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

import grpc

import samovar
from conformance import concurrent, latents, masks
from conformance.programs import ProgramChecks
from conformance.rejections import check_rejection
from conformance.results import Check, print_header, run_check
from conformance.sample_inputs import SampleInputs
from conformance.tokens import TokenChecks
from samovar.operations import OPERATIONS
from samovar.v1.inference_pb2_grpc import InferenceStub


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite and return the exit code."""
    options = _build_parser().parse_args(arguments)
    with (
        samovar.Client(options.address, timeout=None) as client,
        grpc.insecure_channel(options.address) as channel,
    ):
        stub = InferenceStub(channel)
        models = [model for model in client.models() if not options.models or model.name in options.models]
        print_header()
        correct = [run_check(check) for check in _checks(client, models, options.rows, options.steps)]
        print("\nUnsupported operations")
        rejected = [
            check_rejection(stub, model, operation)
            for model in models
            for operation in OPERATIONS
            if operation not in model.operations
        ]
    answers = f"{sum(correct)} of {len(correct)} answers correct"
    print(f"\n{answers}, {sum(rejected)} of {len(rejected)} rejections, {len(models)} models")
    return 0 if models and all(correct) and all(rejected) else 1


def _checks(
    client: samovar.Client, models: Sequence[samovar.Model], num_rows: int, max_steps: int | None
) -> Iterator[Check]:
    sample_inputs = SampleInputs(client, models, num_rows)
    programs = [ProgramChecks(client, model, sample_inputs, max_steps) for model in models]
    for program_checks in programs:
        yield from program_checks.checks()
        yield from masks.checks(program_checks)
        yield from latents.checks(client, program_checks.model, sample_inputs)
        yield from TokenChecks(client, program_checks.model).checks()
    exchanges = [exchange for program_checks in programs for exchange in program_checks.exchanges]
    yield from concurrent.checks(client, exchanges)


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conformance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="models to check (default: all)")
    parser.add_argument(
        "--address",
        default="127.0.0.1:8001",
        metavar="HOST:PORT",
        help="address of the server (default: %(default)s)",
    )
    parser.add_argument(
        "--rows", type=_num_rows, default=4, help="rows per request, at least 2 (default: %(default)s)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        help="maximum number of steps where a parameter sets it (default: the models' own)",
    )
    return parser


def _num_rows(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"expected an integer >= 2, got {text}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
