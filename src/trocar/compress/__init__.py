"""Floor 5: make a model smaller. One module or folder per method."""
