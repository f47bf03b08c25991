"""Exercise every operation of every model that a server serves, through the wire, and print what came of it.

python operations.py                                # all models of the server on this machine
python operations.py --rows 8 digits-vae            # one of them, with more rows
python operations.py --steps 20                     # sooner: rows that may say so take 20 steps at most

What to ask for is read from the models' descriptions alone:

- each operation and method as it is, with its optional inputs, with each choice of its settings, and with
  each number off its default, which has to be heeded (exercise/programs.py);
- rows of which a part is given, and stays (exercise/given.py);
- walks and edits in the latent space of what decodes (exercise/latents.py);
- prompts, streams, stops and MIDI files of what writes (exercise/writing.py);
- all of that again at the same time: each row has the bytes that it had alone (exercise/mixed.py);
- what a model lacks, which has to be refused with FAILED_PRECONDITION and a reason (exercise/refusals.py).

Rows to work on are samples of a model with such values where one is served, and random numbers within the
declared bounds where none is. An answer is right when it has the declared shape, type, bounds and steps,
holds no NaN, and when the last row, asked for alone, is the same: to the byte where the server says
"bitwise". Exits with 1 if anything was otherwise.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence

import grpc

import samovar
from conformance import concurrent, latents, masks, results
from conformance.programs import Programs
from conformance.rejections import refuse
from conformance.sample_inputs import SampleInputs
from conformance.tokens import Writer
from samovar.operations import OPERATIONS
from samovar.v1.inference_pb2_grpc import InferenceStub


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    with (
        samovar.Client(options.address, timeout=None) as client,
        grpc.insecure_channel(options.address) as channel,
    ):
        stub = InferenceStub(channel)
        models = [each for each in client.models() if not options.models or each.name in options.models]
        results.head()
        done = [results.perform(exercise) for exercise in _exercises(client, models, options)]
        print("\nWhat the models lack")
        lacking = [(model, name) for model in models for name in OPERATIONS if name not in model.operations]
        refused = [refuse(stub, model, name) for model, name in lacking]
    counts = f"{sum(done)} of {len(done)} answers right, {sum(refused)} of {len(refused)} refusals"
    print(f"\n{counts}, {len(models)} models")
    return 0 if models and all(done) and all(refused) else 1


def _exercises(
    client: samovar.Client, models: Sequence[samovar.Model], options: argparse.Namespace
) -> Iterator[results.Exercise]:
    pantry = SampleInputs(client, models, options.rows)
    everything = [Programs(client, model, pantry, options.steps) for model in models]
    for programs in everything:
        yield from programs.exercises()
        yield from masks.exercises(programs)
        yield from latents.exercises(client, programs.model, pantry)
        yield from Writer(client, programs.model).exercises()
    yield from concurrent.exercises(client, [pair for programs in everything for pair in programs.asked])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="only these models (default: all)")
    parser.add_argument(
        "--address", default="127.0.0.1:8001", metavar="HOST:PORT", help="the server (%(default)s)"
    )
    parser.add_argument(
        "--rows", type=_several, default=4, help="how many to ask for at a time, 2 or more (%(default)s)"
    )
    parser.add_argument("--steps", type=int, help="the most that a row takes (default: the models' own)")
    return parser


def _several(text: str) -> int:
    if (count := int(text)) < 2:
        raise ValueError(f"expected 2 at least, got {count}")
    return count


if __name__ == "__main__":
    sys.exit(main())
