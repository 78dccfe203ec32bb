"""One training run: its ranks, model, data, steps and what is written of them."""
