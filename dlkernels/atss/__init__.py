"""Adaptive training sample selection: which anchors of a batch belong to which boxes."""
