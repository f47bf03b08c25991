"""Channel options, retries and deadlines; no I/O."""

import json
import time

DEFAULT_ADDRESS = "127.0.0.1:8001"
DEFAULT_TIMEOUT = 60.0
MAX_MESSAGE_BYTES = 64 * 2**20

ChannelOptions = tuple[tuple[str, str | int], ...]

# Every call may be retried: the client chooses the seed before it sends the request, so that a retry
# returns the same bytes.
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
    # gRPC retries only requests that fit its buffer, which is 256 KiB by default.
    ("grpc.per_rpc_retry_buffer_size", MAX_MESSAGE_BYTES),
    # gRPC servers close connections that send pings more often than every five minutes.
    ("grpc.keepalive_time_ms", 300_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


class Deadline:
    """Deadline shared by all RPCs of one call.

    Args:
        timeout: Seconds from now; None for no deadline.
    """

    def __init__(self, timeout: float | None) -> None:
        self._end = None if timeout is None else time.monotonic() + timeout

    def remaining(self) -> float | None:
        """Return the seconds left, at least 0; None without a deadline."""
        return None if self._end is None else max(0.0, self._end - time.monotonic())
