"""Client for Samovar, a gRPC server for generative models: the public surface."""

from importlib.metadata import version

from samovar.aio import AsyncClient, AsyncSampleStream
from samovar.client import Client, SampleStream
from samovar.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    SamovarError,
    ServerError,
    Unavailable,
    UnsupportedOperation,
    Violation,
)
from samovar.model import Input, Model, Operation, Parameter, Quality, ScoreKind, TensorSpec, Value
from samovar.result import Canvas, Determinism, Preview, Result, Rows, Run, Scores, ServerInfo, Timings

__version__ = version("samovar")

__all__ = [
    "AsyncClient",
    "AsyncSampleStream",
    "Cancelled",
    "Canvas",
    "Client",
    "DeadlineExceeded",
    "Determinism",
    "Input",
    "InvalidRequest",
    "Model",
    "ModelNotFound",
    "Operation",
    "Overloaded",
    "Parameter",
    "Preview",
    "Quality",
    "Result",
    "Rows",
    "Run",
    "SamovarError",
    "SampleStream",
    "ScoreKind",
    "Scores",
    "ServerError",
    "ServerInfo",
    "TensorSpec",
    "Timings",
    "Unavailable",
    "UnsupportedOperation",
    "Value",
    "Violation",
    "__version__",
]
