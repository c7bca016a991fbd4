"""The code that travels with a checkpoint: flat, importing its siblings and what Transformers brings."""
