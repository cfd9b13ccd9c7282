"""The aggregation service: rounds (a pure state machine), sums, and the server around them."""
