"""The method in plain PyTorch, exact to the definitions: what every kernel is checked against."""
