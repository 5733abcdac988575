"""Update rules: what becomes of a weight, given its gradient. train/optim.py is the frame around them."""
