"""Carrying out a plan, and reading results, tensor by tensor."""
