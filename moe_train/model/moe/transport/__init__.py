"""Transports: how tokens reach their experts across the mesh axis `expert`, and how the results come back."""
