"""Plan what a run needs on hardware that is not present: memory, bytes, time and money, before anything is paid."""
