"""JSON serialization of dataclasses, fields of options, plugins and recipe files."""
