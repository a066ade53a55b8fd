"""The backbones and what reads them."""
