"""Text of programs for people: settings, and example calls for the shell and for Python.

Does not import torch.
"""

from samovar import midi
from samovar.tensors import DTYPES
from samovar.v1 import manifest_pb2

Program = manifest_pb2.Program
Manifest = manifest_pb2.Manifest

_NUM_ROWS, _SEED = 16, 7
_FILE_EXTENSIONS = {
    manifest_pb2.DataSpec.KIND_IMAGE: "png",
    manifest_pb2.DataSpec.KIND_VECTOR: "npy",
    manifest_pb2.DataSpec.KIND_TOKENS: "txt",
}
# Operations that return rows of the data.
_RETURNS_ROWS = ("sample", "reconstruct", "decode")
# Operations whose result the command line prints.
_PRINTS_RESULT = ("score", "energy", "classify")


def format_tensor(spec: manifest_pb2.TensorSpec) -> str:
    """Return dtype, shape and bounds of one row: `uint8[8, 8] in 0..16`."""
    shape = ", ".join(map(str, spec.shape))
    if not spec.HasField("minimum") and not spec.HasField("maximum"):
        return f"{DTYPES[spec.dtype].name}[{shape}]"
    low = f"{spec.minimum:g}" if spec.HasField("minimum") else ""
    high = f"{spec.maximum:g}" if spec.HasField("maximum") else ""
    return f"{DTYPES[spec.dtype].name}[{shape}] in {low}..{high}"


def format_default(parameter: manifest_pb2.Parameter) -> str:
    """Return the default value of a parameter."""
    if parameter.type == manifest_pb2.Parameter.TYPE_CHOICE:
        return parameter.choices[int(parameter.default_value)]
    if parameter.type == manifest_pb2.Parameter.TYPE_BOOLEAN:
        return "true" if parameter.default_value else "false"
    return f"{parameter.default_value:g}"


def format_parameter(parameter: manifest_pb2.Parameter) -> str:
    """Return the allowed values and the default value of a parameter: `0..2, default 1`."""
    if parameter.type == manifest_pb2.Parameter.TYPE_CHOICE:
        allowed = " | ".join(parameter.choices)
    elif parameter.type == manifest_pb2.Parameter.TYPE_BOOLEAN:
        allowed = "true | false"
    else:
        allowed = f"{parameter.minimum:g}..{parameter.maximum:g}"
    return f"{allowed}, default {format_default(parameter)}"


def format_steps(program: Program) -> str:
    """Return the number of steps of a row."""
    if not program.step:
        return "One call, no steps."
    count, units = program.steps.parameter or str(program.steps.fixed), program.steps.units_per_step
    early = ", fewer if a row ends early" if program.steps.done_flag else ""
    return f"Steps: {count}{f' / {units}' if units > 1 else ''}{early}."


def shell_command(program: Program, manifest: Manifest) -> str:
    """Return a command line that calls the program."""
    words = ["samovar", program.operation, manifest.name]
    if program.variant:
        words += ["--variant", program.variant]
    if program.operation == "sample":
        words += ["-n", str(_NUM_ROWS), "--seed", str(_SEED)]
    inputs = required_inputs(program)
    for name in inputs:
        words += ["--input", f"{name}.npy" if len(inputs) == 1 else f"{name}={name}.npy"]
    if program.operation not in _PRINTS_RESULT:
        extension = _file_extension(manifest.data_spec) if program.operation in _RETURNS_ROWS else "npy"
        words += ["-o", f"{manifest.name}.{extension}"]
    return " ".join(words)


def _file_extension(data_spec: manifest_pb2.DataSpec) -> str:
    return "mid" if midi.is_music(data_spec.vocabulary) else _FILE_EXTENSIONS[data_spec.kind]


def python_call(program: Program, manifest: Manifest) -> str:
    """Return Python code that calls the program."""
    inputs = required_inputs(program)
    mapping = "{" + ", ".join(f'"{name}": {name}' for name in inputs) + "}"
    arguments = [f'"{manifest.name}"']
    if program.operation == "sample":
        arguments += [str(_NUM_ROWS), f"seed={_SEED}", *([f"inputs={mapping}"] if inputs else [])]
    else:
        arguments += [inputs[0] if len(inputs) == 1 else mapping]
    if program.variant:
        arguments.append(f'variant="{program.variant}"')
    call = f"client.{program.operation}({', '.join(arguments)})"
    return f"with samovar.Client() as client:\n    result = {call}"


def required_inputs(program: Program) -> list[str]:
    """Return the names of the inputs that a request must contain."""
    return [spec.tensor.name for spec in program.inputs if not spec.optional]
