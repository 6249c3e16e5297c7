"""Tasks: a model, its loss, and its parameters that are trained."""
