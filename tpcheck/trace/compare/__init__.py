"""Comparing two traces: what rounding explains, and the module at fault."""
