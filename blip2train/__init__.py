"""blip2train: BLIP-2's two-stage pre-training, for research."""

__version__ = "0.1.0"
