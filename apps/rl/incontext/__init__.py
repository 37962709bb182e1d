"""Learning in context: a transformer reads what an agent did in a task and acts better in the next episode."""
