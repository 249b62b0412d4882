"""Before a long run: what the method does to a model, and what a step costs."""
