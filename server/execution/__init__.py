"""Program execution over slots: tensors, state and noise."""
