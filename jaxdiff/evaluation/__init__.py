"""Scores of trained models, by rules that read images back; nothing here is learned."""
