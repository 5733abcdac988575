"""Runs for others: repositories on the Hugging Face hub with a model card, and evaluations in W&B."""
