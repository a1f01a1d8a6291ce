"""What a run would take on hardware that is not here: memory, bytes, time and money, before anything is paid."""
