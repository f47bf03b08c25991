"""gRPC and protobuf: the service, message conversion, status codes, health and worker processes."""
