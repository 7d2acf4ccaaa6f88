"""Pairs of forward and backward over named parameters."""
