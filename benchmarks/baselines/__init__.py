"""Other methods to compare with, each small and whole: DDPO, the cross-entropy method and random search."""
