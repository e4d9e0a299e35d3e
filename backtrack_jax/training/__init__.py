"""Training: packing, loss, steps, adapters. Scripts use it; no other part of the package does."""
