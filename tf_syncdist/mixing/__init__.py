"""Update rules of strategies that mix models. Pure."""
