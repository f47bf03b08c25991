"""Random numbers that graphs read: one interface, drawn on the host or by a kernel on a GPU."""

from server.execution.noise.base import KEY_TABLES, ROW, SEED, NoiseKeys, NoiseSource

__all__ = ["KEY_TABLES", "ROW", "SEED", "NoiseKeys", "NoiseSource"]
