"""Experiment trackers: each works in a process of its own, so that its failure or slowness never touches the run."""
