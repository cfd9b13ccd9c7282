"""Code generated from `protos/`; see `protos/README.md`."""
