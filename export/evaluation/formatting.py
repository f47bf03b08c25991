"""Text of a quality figure: value, standard error, unit and reference value. Does not import torch."""

from samovar.v1 import manifest_pb2


def format_quality(quality: manifest_pb2.Quality) -> str:
    """Return name, value, standard error, unit and reference value in one line."""
    reference = f", real data {quality.reference_value:.3f}" if quality.HasField("reference_value") else ""
    return f"{quality.name}: {format_value(quality)} {quality.unit}".rstrip() + reference


def format_value(quality: manifest_pb2.Quality) -> str:
    """Return the value and its standard error, without the unit."""
    error = f" ± {quality.standard_error:.3f}" if quality.HasField("standard_error") else ""
    return f"{quality.value:.3f}{error}"
