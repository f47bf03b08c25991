"""python -m export write: an artifact from a Python file of one's own; nothing is trained."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from export.commands.options import add_format, add_models, command
from export.graphs import formats

if TYPE_CHECKING:
    from export.commands.options import Commands

_DESCRIPTION = """\
Run a Python file, take the model that it calls MODEL, write MODELS/NAME/VERSION and verify it.
examples/ holds such files, docs/custom-models.md explains them."""
_ENDINGS = {"image": ".png", "tokens": ".txt", "vector": ".npy"}


def add(commands: "Commands") -> None:
    """The command `write`."""
    parser = command(commands, "write", "export a model of one's own from a Python file", _DESCRIPTION)
    parser.add_argument("file", type=Path, help="such as examples/galaxy.py")
    parser.add_argument("--name", default="", help="the artifact's name; the file's when left out")
    add_format(parser)
    add_models(parser)
    parser.set_defaults(command=_write)


def _write(options: argparse.Namespace) -> int:
    from export import custom_model
    from export.artifacts import reader

    chosen = formats.CHOICES[options.format]
    path = custom_model.write(options.file, options.models, options.name, chosen)
    written = reader.read(path)
    operations = list(dict.fromkeys(program.operation for program in written.programs))
    print(f"Wrote {path}, verified in {' and '.join(chosen)}: {', '.join(operations)}")
    print(f"  serve it:  python -m server --models {options.models}")
    if "sample" in operations:
        kind = written.data_spec.Kind.Name(written.data_spec.kind).removeprefix("KIND_").lower()
        print(f"  ask it:    samovar sample {written.name} -n 16 --seed 7 -o {written.name}{_ENDINGS[kind]}")
    return 0
