"""What models lack, asked for past the client, which would refuse it by itself: refused with a reason."""

from collections.abc import Iterator

import grpc

import samovar
from conformance.requests import SEED
from samovar.errors import SamovarError, from_rpc
from samovar.operations import parse_program_name
from samovar.v1 import inference_pb2
from samovar.v1.inference_pb2_grpc import InferenceStub


def refuse(stub: InferenceStub, model: samovar.Model, operation: str) -> bool:
    """Ask for what the model lacks, print the refusal; whether it was refused, and as it should be."""
    refusal = _refusal(stub, model, operation)
    wrong = ["answered"] if refusal is None else list(_problems(refusal, model))
    verdict = f"FAILED, {'; '.join(wrong)}" if wrong else "refused"
    print(f"{model.name:<17}{operation:<18}{verdict}: {refusal}", flush=True)
    return not wrong


def _refusal(stub: InferenceStub, model: samovar.Model, operation: str) -> SamovarError | None:
    selector = inference_pb2.ModelSelector(name=model.name, version=model.version)
    try:
        if operation == "sample":
            list(stub.Sample(inference_pb2.SampleRequest(model=selector, rows=1, seed=SEED)))
        else:
            getattr(stub, operation.capitalize())(inference_pb2.TransformRequest(model=selector, seed=SEED))
    except grpc.RpcError as error:
        return from_rpc(error)
    return None


def _problems(refusal: SamovarError, model: samovar.Model) -> Iterator[str]:
    if not isinstance(refusal, samovar.UnsupportedOperation):
        yield f"expected FAILED_PRECONDITION, got {type(refusal).__name__}"
        return
    supported = {parse_program_name(name)[0] for name in model.operations}
    if set(refusal.supported) != supported:
        yield f"expected {', '.join(sorted(supported))} as what it has"
    why = refusal.details.facts.get("why", "")
    if not why or why not in str(refusal):
        yield "without a reason"
