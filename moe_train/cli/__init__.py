"""What a person types: arguments and printing. Each command calls one function of `commands`."""
