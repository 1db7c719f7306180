"""How a sweep runs: points, workers, leases, devices, hosts."""
