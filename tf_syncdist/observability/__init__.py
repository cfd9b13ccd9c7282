"""Reports and timelines: what happened to every worker, and when."""
