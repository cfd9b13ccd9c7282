"""Reports: what happened to every worker, in plain lines."""
