"""Floor 0: errors, settings, atomic files, random streams, progress. Knows nothing about models."""
