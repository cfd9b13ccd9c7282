"""How workers and the aggregation service talk: wire format, streams, and the worker's session."""
