"""Tests that need an NVIDIA GPU. Name them: JAX_PLATFORMS=cuda,cpu python -m pytest tests/gpu -n0"""
