"""Training: the loop and what it is made of. It knows Tasks by their contract only."""
