"""What a plan runs: its Kubernetes objects, written from templates, and the programs inside the pods."""
