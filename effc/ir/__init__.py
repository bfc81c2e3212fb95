"""The graphs that effc works on, and the few functions that keep them honest."""
