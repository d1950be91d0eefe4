"""Squeeze-and-excitation: average pool, two small linear layers, gate and channel scale."""
