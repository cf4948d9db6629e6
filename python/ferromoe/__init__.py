"""Faster and smaller Mixture-of-Experts models for PyTorch."""
