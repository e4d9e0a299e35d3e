"""What each stage of a run does: one module a stage, called by `pipeline`."""
