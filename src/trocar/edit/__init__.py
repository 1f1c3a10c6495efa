"""Floor 5: correct a model. One module or folder per method."""
