"""Who plays which role, and processes on this machine."""
