"""What travels as what: tensors cut into slices and spread over shards. Pure."""
