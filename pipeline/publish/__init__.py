"""What leaves the store, or shows it: cards, other formats, other places, the index of everything."""
