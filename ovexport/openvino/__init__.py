"""The OpenVINO side: graphs, the runtime, tracing and conversion."""
