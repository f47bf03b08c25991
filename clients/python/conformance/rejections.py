"""Checks of unsupported operations. The requests bypass the client, which would reject them itself."""

from collections.abc import Iterator

import grpc

import samovar
from conformance.requests import SEED
from samovar.errors import SamovarError, from_rpc
from samovar.operations import parse_program_name
from samovar.v1 import inference_pb2
from samovar.v1.inference_pb2_grpc import InferenceStub


def check_rejection(stub: InferenceStub, model: samovar.Model, operation: str) -> bool:
    """Request an unsupported operation, print a line, and return whether the rejection was as expected."""
    error = _request_error(stub, model, operation)
    problems = ["expected FAILED_PRECONDITION"] if error is None else list(_problems(error, model))
    result = "rejected" if not problems else f"FAILED: {'; '.join(problems)}; got"
    print(f"{model.name:<16} {operation:<17} {result}: {error or 'an answer'}", flush=True)
    return not problems


def _request_error(stub: InferenceStub, model: samovar.Model, operation: str) -> SamovarError | None:
    selector = inference_pb2.ModelSelector(name=model.name, version=model.version)
    try:
        if operation == "sample":
            list(stub.Sample(inference_pb2.SampleRequest(model=selector, rows=1, seed=SEED)))
        else:
            getattr(stub, operation.capitalize())(inference_pb2.TransformRequest(model=selector, seed=SEED))
    except grpc.RpcError as error:
        return from_rpc(error)
    return None


def _problems(error: SamovarError, model: samovar.Model) -> Iterator[str]:
    if not isinstance(error, samovar.UnsupportedOperation):
        yield "expected FAILED_PRECONDITION"
        return
    supported = {parse_program_name(name)[0] for name in model.operations}
    if set(error.supported) != supported:
        yield f"expected the supported operations {', '.join(sorted(supported))}"
    reason = error.details.metadata.get("why", "")
    if not reason or reason not in str(error):
        yield "expected a reason"
