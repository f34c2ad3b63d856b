"""Training methods against each other: which runs there are, training them in turns, and what they come to."""
