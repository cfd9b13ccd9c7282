"""How workers and the aggregation service talk: wire format, streams, and the worker's session."""

import os

# Read by gRPC when it starts. A training program may start other processes, and gRPC's fork
# handlers would print a line each time although none of ours uses gRPC after a fork.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
