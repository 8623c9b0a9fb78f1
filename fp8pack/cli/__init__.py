"""The command line: each command builds a request, calls one function, and prints its result."""
