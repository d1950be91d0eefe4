"""The maxima of maps over windows of 13, 9 and 5 pixels, before the maps themselves."""
