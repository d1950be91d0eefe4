"""Residual blocks that keep the raw outputs of their convolutions for backward, and no other maps.

Built of several families' ops, and so no family itself.
"""
