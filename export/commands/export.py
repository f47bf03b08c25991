"""python -m export export: write an artifact from a Python file that defines a model; no training."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from export.commands.options import add_command, add_format, add_models
from export.graphs import formats

if TYPE_CHECKING:
    from export.commands.options import Commands

_DESCRIPTION = """\
Run a Python file that defines MODEL, write the artifact MODELS/NAME/VERSION and verify it.
Nothing is trained.

examples/galaxy.py and examples/ising.py are complete files; docs/custom-models.md is the guide."""
_FILE_SUFFIXES = {"image": ".png", "tokens": ".txt", "vector": ".npy"}


def add(commands: "Commands") -> None:
    """Add the command `export`."""
    parser = add_command(
        commands, "export", "export a custom model from a Python file", _DESCRIPTION, old_name="write"
    )
    parser.add_argument("file", type=Path, help="Python file, for example examples/galaxy.py")
    parser.add_argument("--name", default="", help="name of the artifact (default: from MODEL or the file)")
    add_format(parser)
    add_models(parser)
    parser.set_defaults(command=_export)


def _export(options: argparse.Namespace) -> int:
    from export import custom_model
    from export.artifacts import reader

    file_formats = formats.CHOICES[options.format]
    path = custom_model.write(options.file, options.models, options.name, file_formats)
    manifest = reader.read(path)
    operations = list(dict.fromkeys(program.operation for program in manifest.programs))
    print(f"Wrote {path}, verified in {' and '.join(file_formats)}: {', '.join(operations)}")
    print(f"  serve:  python -m server --models {options.models}")
    if "sample" in operations:
        kind = manifest.data_spec.Kind.Name(manifest.data_spec.kind).removeprefix("KIND_").lower()
        output = f"{manifest.name}{_FILE_SUFFIXES[kind]}"
        print(f"  sample: samovar sample {manifest.name} -n 16 --seed 7 -o {output}")
    return 0
