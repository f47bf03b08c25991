"""How a figure of quality is written for people: never without its unit, error and floor. Light: no torch."""

from samovar.v1 import manifest_pb2


def line(quality: manifest_pb2.Quality) -> str:
    """A figure with all that it is read beside, in one line."""
    floor = f", real data {quality.reference_value:.3f}" if quality.HasField("reference_value") else ""
    return f"{quality.name}: {figure(quality)}{floor}"


def figure(quality: manifest_pb2.Quality) -> str:
    """The value, its standard error and its unit."""
    error = f" ± {quality.standard_error:.3f}" if quality.HasField("standard_error") else ""
    return f"{quality.value:.3f}{error} {quality.unit}".rstrip()
