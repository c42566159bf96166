"""vsock, hybrid vsock and TCP endpoints."""
