"""Judges: who says which part of a trace is backtracking. One file or folder each; `labelling` lists them."""
