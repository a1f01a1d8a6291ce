"""The machine: mesh, processes, devices, host memory, files, progress."""
