"""A configuration -> a list of blocks."""
