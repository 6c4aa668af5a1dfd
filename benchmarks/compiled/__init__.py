"""What the training step holds when it is compiled for devices that are not there."""
