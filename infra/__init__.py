"""The Pulumi program: a plan becomes a cluster with GPU pools, storage, secrets, monitoring and workloads."""
