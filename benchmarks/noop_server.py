"""No-op gRPC server: every method returns the same bytes.

It measures the cost of a Python gRPC server without a model. `python -m benchmarks.noop_server BYTES` prints
its port and serves until it is terminated.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import grpc


class NoopHandler(grpc.GenericRpcHandler):
    """Handler that answers every unary method with the same reply and does not parse the request."""

    def __init__(self, reply: bytes) -> None:
        async def answer(request: bytes, context: Any) -> bytes:
            return reply

        self._answer: Callable[[bytes, Any], Awaitable[bytes]] = answer

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return grpc.unary_unary_rpc_method_handler(self._answer)


async def serve(reply_bytes: int) -> None:
    """Listen on a free port, print it, and serve until the process ends."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((NoopHandler(bytes(reply_bytes)),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
