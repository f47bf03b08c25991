"""The formats in which graphs are written: their names and endings, and what `--format` may say. No torch."""

from collections.abc import Mapping

SUFFIXES: Mapping[str, str] = {
    "onnx": ".onnx",
    "torchscript": ".pt",
    # Upstream, this is what follows TorchScript.
    "torch_export": ".pt2",
}
FORMATS = tuple(SUFFIXES)
DEFAULT_FORMATS = ("onnx", "torchscript")

CHOICES: Mapping[str, tuple[str, ...]] = {
    **{format: (format,) for format in FORMATS},
    "both": DEFAULT_FORMATS,
    "all": FORMATS,
}
