"""How a program is asked for: its settings in words, and the client's lines to copy. Light: no torch."""

from samovar import midi
from samovar.tensors import DTYPES
from samovar.v1 import manifest_pb2

Program = manifest_pb2.Program
Manifest = manifest_pb2.Manifest

_ROWS, _SEED = 16, 7
_ENDINGS = {
    manifest_pb2.DataSpec.KIND_IMAGE: "png",
    manifest_pb2.DataSpec.KIND_VECTOR: "npy",
    manifest_pb2.DataSpec.KIND_TOKENS: "txt",
}
# Operations that answer rows of the model's own kind.
_MAKING = ("sample", "reconstruct", "decode")
_PRINTING = ("score", "energy", "classify")


def tensor(spec: manifest_pb2.TensorSpec) -> str:
    """Element type, shape and bounds of one row."""
    shape = ", ".join(map(str, spec.shape))
    if not spec.HasField("minimum") and not spec.HasField("maximum"):
        return f"{DTYPES[spec.dtype].name}[{shape}]"
    low = f"{spec.minimum:g}" if spec.HasField("minimum") else ""
    high = f"{spec.maximum:g}" if spec.HasField("maximum") else ""
    return f"{DTYPES[spec.dtype].name}[{shape}] in {low}..{high}"


def default(parameter: manifest_pb2.Parameter) -> str:
    """A parameter's value where none is given."""
    if parameter.type == manifest_pb2.Parameter.TYPE_CHOICE:
        return parameter.choices[int(parameter.default_value)]
    if parameter.type == manifest_pb2.Parameter.TYPE_BOOLEAN:
        return "true" if parameter.default_value else "false"
    return f"{parameter.default_value:g}"


def bounds(parameter: manifest_pb2.Parameter) -> str:
    """What a parameter may be, and what it is when left out."""
    if parameter.type == manifest_pb2.Parameter.TYPE_CHOICE:
        allowed = " | ".join(parameter.choices)
    elif parameter.type == manifest_pb2.Parameter.TYPE_BOOLEAN:
        allowed = "true | false"
    else:
        allowed = f"{parameter.minimum:g}..{parameter.maximum:g}"
    return f"{allowed}, else {default(parameter)}"


def steps(program: Program) -> str:
    """How long a row takes."""
    if not program.step:
        return "At once."
    count, per = program.steps.parameter or str(program.steps.fixed), program.steps.units_per_step
    early = ", fewer where a row ends early" if program.steps.done_flag else ""
    return f"Steps: {count}{f' / {per}' if per > 1 else ''}{early}."


def command(program: Program, manifest: Manifest) -> str:
    """The line for a shell."""
    words = ["samovar", program.operation, manifest.name]
    if program.variant:
        words += ["--method", program.variant]
    if program.operation == "sample":
        words += ["-n", str(_ROWS), "--seed", str(_SEED)]
    needed = required(program)
    for name in needed:
        words += ["--input", f"{name}.npy" if len(needed) == 1 else f"{name}={name}.npy"]
    if program.operation not in _PRINTING:
        ending = _ending(manifest.data_spec) if program.operation in _MAKING else "npy"
        words += ["-o", f"{manifest.name}.{ending}"]
    return " ".join(words)


def _ending(value: manifest_pb2.DataSpec) -> str:
    return "mid" if midi.is_music(value.vocabulary) else _ENDINGS[value.kind]


def call(program: Program, manifest: Manifest) -> str:
    """The lines for Python."""
    needed = required(program)
    mapping = "{" + ", ".join(f'"{name}": {name}' for name in needed) + "}"
    words = [f'"{manifest.name}"']
    if program.operation == "sample":
        words += [str(_ROWS), f"seed={_SEED}", *([f"inputs={mapping}"] if needed else [])]
    else:
        words += [needed[0] if len(needed) == 1 else mapping]
    if program.variant:
        words.append(f'method="{program.variant}"')
    return f"with samovar.Client() as client:\n    result = client.{program.operation}({', '.join(words)})"


def required(program: Program) -> list[str]:
    """The names of the inputs that a request must give."""
    return [each.tensor.name for each in program.inputs if not each.optional]
