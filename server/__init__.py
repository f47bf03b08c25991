"""gRPC server for generative models; its folders are layers."""

__version__ = "0.1.0"
