"""Health service (grpc.health.v1): NOT_SERVING until all models are loaded, and while the server drains.

`python -m server.rpc.health` checks a server and exits with status 0 if it reports SERVING.
"""

import argparse
import asyncio
import sys

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

INFERENCE = "samovar.v1.Inference"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """Health service for the server as a whole ("") and for the inference service."""

    def __init__(self) -> None:
        self._servicer = health.aio.HealthServicer()

    async def add_to(self, server: grpc.aio.Server) -> None:
        """Register with a server that has not started, and report NOT_SERVING."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        await self.set_serving(False)

    async def set_serving(self, is_serving: bool) -> None:
        for service in ("", INFERENCE):
            await self._servicer.set(service, SERVING if is_serving else NOT_SERVING)

    async def shut_down(self) -> None:
        """Report NOT_SERVING for good; later calls of `set_serving` have no effect."""
        await self._servicer.enter_graceful_shutdown()


async def is_serving(address: str, timeout_seconds: float) -> bool:
    """Return whether the server at an address reports SERVING within a timeout."""
    async with grpc.aio.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        try:
            response = await check(health_pb2.HealthCheckRequest(service=INFERENCE), timeout=timeout_seconds)
        except grpc.aio.AioRpcError:
            return False
    return bool(response.status == SERVING)


def main() -> int:
    """Check a server and print its status; returns the exit status. The container's health check."""
    parser = argparse.ArgumentParser(
        prog="python -m server.rpc.health", description="Exit with status 0 if a server reports SERVING."
    )
    parser.add_argument("--address", default="127.0.0.1:8001", help="HOST:PORT (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=3.0, help="timeout in seconds (default: %(default)s)"
    )
    arguments = parser.parse_args()
    serving = asyncio.run(is_serving(arguments.address, arguments.timeout))
    print("SERVING" if serving else "NOT_SERVING")
    return 0 if serving else 1


if __name__ == "__main__":
    sys.exit(main())
