"""Batch norm, activation, residual sum and average pool in one pass."""
