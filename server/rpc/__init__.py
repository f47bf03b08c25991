"""gRPC and protobuf: servicer, codec, status codes, health, worker processes."""
