"""From the original's checkpoints to folders for Transformers, to the Hub, and back."""
