"""Device meshes, shardings and several processes."""
