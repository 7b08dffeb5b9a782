"""The model: window, exact store, neural memory, the block that combines them, their state."""
