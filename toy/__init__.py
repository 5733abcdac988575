"""The toy model of computation in superposition: 50 neurons asked for 100 ReLUs, with its ground truth."""
