"""Measuring a model: perplexity, the tasks of lm-evaluation-harness, and the card that tells of it."""
