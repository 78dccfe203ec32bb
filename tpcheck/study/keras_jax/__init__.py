"""Keras 3 and JAX: is tensor parallelism exact, which rules does it obey, and what makes it exact?"""
