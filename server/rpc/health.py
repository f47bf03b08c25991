"""Health, by grpc.health.v1: NOT_SERVING until every model is warm, and while draining.

`python -m server.rpc.health` asks a server and exits with 0 when it serves.
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
    """The standard health service, for the server as a whole and for Inference."""

    def __init__(self) -> None:
        self._servicer = health.aio.HealthServicer()

    async def add_to(self, server: grpc.aio.Server) -> None:
        """Register with a server that has not started; it is NOT_SERVING."""
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        await self.set_serving(False)

    async def set_serving(self, is_serving: bool) -> None:
        for service in ("", INFERENCE):
            await self._servicer.set(service, SERVING if is_serving else NOT_SERVING)

    async def shut_down(self) -> None:
        """NOT_SERVING from now on, whatever is set later."""
        await self._servicer.enter_graceful_shutdown()


async def is_serving(address: str, seconds: float) -> bool:
    """Whether the server at an address says that it serves."""
    async with grpc.aio.insecure_channel(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        try:
            response = await check(health_pb2.HealthCheckRequest(service=INFERENCE), timeout=seconds)
        except grpc.aio.AioRpcError:
            return False
    return bool(response.status == SERVING)


def main() -> int:
    """Ask, print and exit: the container's health check."""
    parser = argparse.ArgumentParser(
        prog="python -m server.rpc.health", description="Exit with 0 when a server serves."
    )
    parser.add_argument("--address", default="127.0.0.1:8001", help="HOST:PORT (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=3.0, help="seconds to wait (default: %(default)s)")
    arguments = parser.parse_args()
    serving = asyncio.run(is_serving(arguments.address, arguments.timeout))
    print("SERVING" if serving else "NOT_SERVING")
    return 0 if serving else 1


if __name__ == "__main__":
    sys.exit(main())
