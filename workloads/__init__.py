"""Kubernetes objects of a plan: servers and training runs, and what they need around them."""
