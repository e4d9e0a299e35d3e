"""The small pair: base and reasoning models on text whose hidden state is known, from grammar to weights."""
