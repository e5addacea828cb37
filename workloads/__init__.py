"""What runs inside the pods of a plan, and how it is written for Kubernetes."""
