"""Formats, granularities, scales and casts. Nothing here knows a file."""
