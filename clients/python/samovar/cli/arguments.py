"""Values of --param, --input and --label, converted to what an operation declares."""

import json
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from samovar._inputs import named_arrays
from samovar._messages import CallOptions, draw_seed
from samovar.cli import files
from samovar.model import Model, Operation, Parameter, ParameterType, Scalar
from samovar.tensors import Array


class UsageError(ValueError):
    """Wrong arguments; the message says what is expected."""


def call_options(args: Namespace, operation: Operation) -> CallOptions:
    """Return the options of a call; a random seed if there is no --seed.

    Raises:
        UsageError: a --param is unknown or has the wrong type.
    """
    options = CallOptions(
        version=args.version,
        format=args.format,
        seed=seed(args),
        first_row=args.first_row,
        parameters=parameters(args.param, operation),
        variant=args.variant,
    )
    return options | CallOptions(priority=args.priority) if args.priority else options


def seed(args: Namespace) -> int:
    """Return --seed, or else a random seed."""
    return draw_seed() if args.seed is None else args.seed


def parameters(texts: Sequence[str], operation: Operation) -> dict[str, Scalar]:
    """Return the values of `NAME=VALUE` texts in the types that the operation declares.

    Raises:
        UsageError: a name is unknown or a value has the wrong type.
    """
    declared = {parameter.name: parameter for parameter in operation.parameters}
    values = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--param {text}: expected NAME=VALUE")
        if name not in declared:
            known = ", ".join(declared) or "none"
            raise UsageError(
                f"--param {text}: unknown parameter {name!r} of {operation.name}; expected one of: {known}"
            )
        values[name] = _parameter_value(value, declared[name])
    return values


def sample_inputs(args: Namespace, model: Model, operation: Operation) -> dict[str, Array]:
    """Return the arrays of --input and --label by name.

    Raises:
        UsageError: an --input or --label cannot be understood.
        FileError: a file cannot be read.
    """
    arrays = named_arrays(inputs(args), operation) if args.input else {}
    if args.label is None:
        return arrays
    indices = {name: index for index, name in enumerate(model.data_spec.class_labels)}
    try:
        labels = [indices[text] if text in indices else int(text) for text in args.label.split(",")]
    except ValueError as error:
        known = ", ".join(indices) or "numbers only"
        raise UsageError(f"--label {args.label}: expected classes of {model.name}: {known}") from error
    return arrays | named_arrays({"label": labels}, operation)


def inputs(args: Namespace) -> Array | dict[str, Array]:
    """Return the arrays of --input by name, or a single array without a name.

    Raises:
        UsageError: an --input cannot be understood.
        FileError: a file cannot be read.
    """
    named: dict[str, Array] = {}
    for text in args.input:
        name, equals, value = text.partition("=")
        if not equals or Path(text).exists():
            content = files.read(Path(text))
            if not isinstance(content, dict):
                if len(args.input) > 1:
                    raise UsageError(f"--input {text}: missing name: use NAME=FILE with several inputs")
                return content
            named |= content
        else:
            named[name] = _input_array(name, value)
    return named


def _parameter_value(text: str, parameter: Parameter) -> Scalar:
    try:
        return _SCALARS.get(parameter.type, str)(text)
    except (ValueError, KeyError) as error:
        raise UsageError(
            f"--param {parameter.name}={text}: expected a value of type {parameter.type}"
        ) from error


_SCALARS: Mapping[ParameterType, Callable[[str], Scalar]] = {
    ParameterType.FLOAT: float,
    ParameterType.INTEGER: int,
    ParameterType.BOOLEAN: {"true": True, "false": False}.__getitem__,
}


def _input_array(name: str, text: str) -> Array:
    if Path(text).suffix == ".npy":
        return np.asarray(files.read(Path(text)))
    try:
        values = np.array(json.loads(f"[{text}]"))
    except ValueError as error:
        raise UsageError(f"--input {name}={text}: expected numbers or FILE.npy") from error
    return values[0] if len(values) == 1 else values
