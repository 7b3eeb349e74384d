"""Networks; each file reads top to bottom."""

from npdrt.models.mlp import MLP

MODELS = {"mlp": MLP}

__all__ = ["MLP", "MODELS"]
