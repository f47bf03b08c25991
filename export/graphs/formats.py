"""Graph file formats: names, file suffixes and the choices of `--format`. Imports no torch."""

from collections.abc import Mapping

SUFFIXES: Mapping[str, str] = {
    "onnx": ".onnx",
    "torchscript": ".pt",
    # The successor of TorchScript upstream.
    "torch_export": ".pt2",
}
FORMATS = tuple(SUFFIXES)
DEFAULT_FORMATS = ("onnx", "torchscript")

CHOICES: Mapping[str, tuple[str, ...]] = {
    **{format: (format,) for format in FORMATS},
    "both": DEFAULT_FORMATS,
    "all": FORMATS,
}
