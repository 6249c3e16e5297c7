"""Evaluators: metrics and images of a model, at intervals of a run and in `jaxdiff evaluate`."""
