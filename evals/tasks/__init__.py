"""lm-eval tasks built from the held-out modules."""
