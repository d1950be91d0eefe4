"""Boxes: what detectors of every kind share."""
