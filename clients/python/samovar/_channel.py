"""How a client reaches a server: channel options, retries, deadlines. Does no I/O."""

import json
import time

DEFAULT_ADDRESS = "127.0.0.1:8001"
DEFAULT_TIMEOUT = 60.0
MAX_MESSAGE_BYTES = 64 * 2**20

ChannelOptions = tuple[tuple[str, str | int], ...]

# Every call may be repeated: the client settles the seed before it sends, so that
# the second attempt answers the same bytes as the first would have.
_SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{"service": "samovar.v1.Inference"}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}

CHANNEL_OPTIONS: ChannelOptions = (
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # gRPC does not retry what it cannot keep, and keeps 256 KiB unless told otherwise.
    ("grpc.per_rpc_retry_buffer_size", MAX_MESSAGE_BYTES),
    # gRPC servers hang up on clients that ping more often than every five minutes.
    ("grpc.keepalive_time_ms", 300_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


class Deadline:
    """The moment by which all calls that serve one request must be done."""

    def __init__(self, timeout: float | None) -> None:
        self._end = None if timeout is None else time.monotonic() + timeout

    def remaining(self) -> float | None:
        """Seconds left, at least 0; None without a deadline."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())
