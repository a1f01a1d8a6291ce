"""How tokens reach their experts across the mesh axis `expert`."""
