"""Timing of single steps: graphs in every runtime and compiler, clocks, the profiler, and a U-Net to time."""
