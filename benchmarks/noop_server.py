"""A gRPC server that does nothing: any call of the Inference service gets the same bytes back.

What a Python front end costs before there is a model behind it. `python -m benchmarks.bare BYTES`
prints its port and serves until it is ended. Knows neither Samovar's server nor its messages.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import grpc


class AnyMethod(grpc.GenericRpcHandler):
    """Answers every method with the same reply, unread and unparsed."""

    def __init__(self, reply: bytes) -> None:
        async def answer(request: bytes, context: Any) -> bytes:
            return reply

        self._answer: Callable[[bytes, Any], Awaitable[bytes]] = answer

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return grpc.unary_unary_rpc_method_handler(self._answer)


async def serve(reply_bytes: int) -> None:
    """Listen on a free port, say which, and serve for ever."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((AnyMethod(bytes(reply_bytes)),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1])))
