"""A model that is there writes: how prompts go on, and what it answers in a conversation."""
