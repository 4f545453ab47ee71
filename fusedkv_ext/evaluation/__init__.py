"""Quality of a trained model: perplexity, loss by position, retrieval of facts from the context."""
