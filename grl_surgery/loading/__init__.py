"""From a name to a network: weights, factories, downloads, example inputs."""
