"""Client for Samovar, a gRPC server for generative models: the public names."""

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
from samovar.model import DataSpec, Input, Model, Operation, Parameter, Quality, ScoreKind, TensorSpec
from samovar.result import (
    Determinism,
    Preview,
    Result,
    RowCollector,
    Rows,
    RunInfo,
    Scores,
    ServerInfo,
    Timings,
)

__version__ = version("samovar")

__all__ = [
    "AsyncClient",
    "AsyncSampleStream",
    "Cancelled",
    "Client",
    "DataSpec",
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
    "RowCollector",
    "Rows",
    "RunInfo",
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
    "Violation",
    "__version__",
]
